"""The benchmark of a training step compares like with like."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_cli
from PIL import Image

from scripts.benchmarks.training import PRESETS, Batch, variants


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.make(PRESETS["test"], torch.device("cpu"))


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_all_variants_take_the_same_step(batch, precision, tolerance):
    losses = {}
    for name in variants(PRESETS["test"], batch, precision, compiled=False):
        with variants(PRESETS["test"], batch, precision, compiled=False)[name].active() as step:
            losses[name] = [step(batch), step(batch)]
    for name, found in losses.items():
        assert found == pytest.approx(losses["ours"], rel=tolerance), name
        assert found[1] != found[0]


def test_the_benchmark_runs(tmp_path):
    run_cli("python", "-m", "scripts.benchmarks.training", "--preset", "test", "--repeats", "2",
            "--precisions", "fp32", "--output", "out", cwd=tmp_path)  # fmt: skip
    result = json.loads((tmp_path / "out/benchmark_training.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows["upstream"]["of_upstreams_memory"] == 1.0 and len(rows["ours"]["ms_runs"]) == 2
    ours, checkpointed = rows["ours"]["peak_bytes"], rows["ours, gradient checkpointing"]["peak_bytes"]
    assert checkpointed < ours < rows["ours, none of the last three"]["peak_bytes"]
    assert result["goals"]["found"][0]["memory"] == ours / rows["upstream"]["peak_bytes"]
    assert "| fp32 | ours | " in (tmp_path / "out/benchmark_training.md").read_text()
    assert Image.open(tmp_path / "out/benchmark_training.png").width > 500


def test_the_page_shows_the_result_on_record():
    from scripts.benchmarks.training_tables import needs_of_methods, step_table

    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "training.md").read_text()
    for name in ("training_step", "training_step_amx"):
        result = json.loads((docs / f"results/{name}.json").read_text())
        assert f"\n{step_table(result)}\n" in page
        assert name == "training_step_amx" or f"\n{needs_of_methods(result)}\n" in page
