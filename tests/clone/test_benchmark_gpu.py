"""scripts/benchmarks/gpu.py: all of it at small sizes on the CPU, without nerfstudio."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
MARK = "pytest.mark." + "gpu"
ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Others(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nerfstudio", "tyro", "rich", "matplotlib", "gsplat", "viser"):
            raise ImportError(f"{name}: not to be needed")

sys.meta_path.insert(0, Others())
from scripts.benchmarks.gpu import main
main()
"""


def test_the_whole_program_runs_on_a_cpu_without_nerfstudio(tmp_path):
    options = ["--sizes", "test", "--device", "cpu", "--repeats", "3", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", ALONE, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    tables = {name: result[name] for name in ("agreement", "paper", "path", "training", "attention", "calls")}
    failed = [row for rows in tables.values() for row in rows if "failed" in row]
    # On a CPU there is no cuDNN, and no flash attention but its own.
    assert {row.get("back_end") for row in failed} <= {"CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "FA3", "FA4"}, failed
    for rows in tables.values():
        for row in rows:
            if "ms" in row:
                assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"] and row["flops"] > 0
    assert {row["difference"] < 0.05 for row in tables["agreement"]} == {True}

    calls = {(r["image_size"], r["views"], r["call"], r["method"]): r for r in tables["calls"]}
    methods = ("ours", "lvsm-decoder", "lvsm-encoder-decoder", "official")
    for count in (1, 2):
        assert (16, count, "encode", "official") not in calls
        for call in ("render", "append"):
            here = [calls[16, count, call, name] for name in methods]
            assert all(row["launches"] > 10 and row["peak_bytes"] > 0 for row in here)
        assert calls[16, count, "render", "ours"]["flops"] < calls[16, count, "render", "official"]["flops"]
    assert calls[16, 2, "encode", "ours"]["flops"] == 2 * calls[16, 1, "encode", "ours"]["flops"]
    assert {(row["views"], row["method"]) for row in tables["paper"]} == {(2, name) for name in methods}

    assert [row["frames_per_call"] for row in tables["path"]] == [1, 4, 16] * 3
    assert len({row["blocks"] for row in tables["path"]}) == 3
    assert all(row["difference"] < 1e-5 and row["frames_per_second"] > 0 for row in tables["path"])
    plain, compiled, checkpointing = tables["training"]
    assert compiled["compiled"] and checkpointing["checkpointing"] and plain["tokens_per_second"] > 0
    assert result["tests"] == [{"left_out": "nerfstudio: not installed"}] and "| nerfstudio: not installed |" in text
    assert text.count("| ---") > 20 and "failed" not in text.split("## Attention")[0]


def test_what_would_take_too_long_is_left_out_and_a_failure_is_a_row():
    from scripts.benchmarks.gpu import SIZES, Bench, _failures
    from scripts.benchmarks.gpu_page import page

    bench = Bench(SIZES["test"], "cpu", seconds=10, longest_run=1.0, repeats=3)
    ran = []
    assert bench.measure(ran.append, flops=int(1e15)) == {"flops": int(1e15), "left_out": "about 3333 s by its FLOPs"}
    bench.deadline = 0.0
    assert bench.measure(ran.append, flops=1)["left_out"] == "no time was left" and not ran
    row = {"views": 4, "method": "ours"}
    with _failures(row):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")
    assert row["failed"] == "OutOfMemoryError: CUDA out of memory"
    names = ("agreement", "path", "training", "attention", "calls", "tests")
    empty = {name: [{"failed": "a | b"}] for name in names}
    facts = dict(
        device="x", torch="2", cuda="12", sizes="test", targets=8, precision="bf16", peak_flops=1e12, repeats=3
    )
    text = page({**facts, **empty, "paper": [row]})
    assert "| 4 | OutOfMemoryError: CUDA out of memory | 24.4 | 123.1 |" in text and "| a / b |" in text


def test_tests_on_a_gpu_are_rows():
    from scripts.benchmarks.gpu import GPU_TESTS, outcomes

    report = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped message="no CUDA"/></testcase>
        <testcase name="c"><failure message="0.3 is not 0.1">where</failure></testcase></testsuite></testsuites>"""
    assert outcomes(report) == [
        {"test": "a", "outcome": "passed"},
        {"test": "b", "outcome": "skipped"},
        {"test": "c", "failed": "0.3 is not 0.1", "outcome": "failed"},
    ]
    marked = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if MARK in file.read_text()}
    assert marked == set(GPU_TESTS)
