"""scripts/benchmarks/efficiency.py: what it counts, that all methods give the same pictures, and one real run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig

SIZE, CONFIG = 32, EfficientLVSMConfig(width=64, num_layers=2, head_dim=32)
RAYS = 18 * SIZE**2 + 72
"""FLOPs of turning a view's rays, and its pose, into the canonical frame: matrix products too, if small ones."""


@pytest.fixture(scope="module")
def network() -> EfficientLVSM:
    torch.manual_seed(0)
    return EfficientLVSM(replace(CONFIG, init_std=0.3)).eval()


def encode_flops(config: EfficientLVSMConfig, n: int) -> int:
    """Of one view of n tokens: tokenizer; 12 d^2 weights, attention to n tokens and cross keys and values a layer."""
    d, patch = config.width, 9 * config.patch_size**2
    return RAYS + 2 * n * patch * d + config.num_layers * (24 * n * d**2 + 4 * n**2 * d + 4 * n * d**2)


def decode_flops(config: EfficientLVSMConfig, n: int, views: int) -> int:
    """Of one target from ``views`` views: tokenizer, head; 14 d^2 weights, attention to itself and to all views."""
    d, pixels = config.width, config.patch_size**2
    layer = 28 * n * d**2 + 4 * n**2 * d + 4 * n * (views * n) * d
    return RAYS + 2 * n * (6 + 3) * pixels * d + config.num_layers * layer


def test_counted_flops_are_those_of_the_formula():
    from scripts.benchmarks.efficiency import Preset, all_flops

    n, counts = (SIZE // CONFIG.patch_size) ** 2, (1, 2, 5)
    flops = all_flops(Preset(SIZE, CONFIG), counts)
    for views in counts:
        encode, decode = encode_flops(CONFIG, n), decode_flops(CONFIG, n, views)
        assert flops["encode"]["cached"][views] == views * encode
        assert flops["render"]["cached"][views] == decode
        assert flops["append"]["cached"][views] == encode + 8 * decode_flops(CONFIG, n, views + 1)
        assert flops["path"]["cached"][views] == views * encode + 120 * decode
        assert flops["path"]["recomputing"][views] == 120 * (views * encode + decode)
        assert flops["path"]["upstream"][views] == 30 * views * encode + 120 * decode
        assert flops["append"]["upstream"][views] == flops["append"]["cached"][views]
        assert flops["append"]["recomputing"][views] == flops["append"]["cached"][views] + views * encode
    a, b, c = (flops["append"]["cached"][views] for views in counts)
    assert (b - a) * 3 == c - b  # linear in the number of views


def test_flops_at_the_papers_sizes():
    """The reference's model of them (one target, 256 px), which leaves out tokenizers and head: within a percent."""
    from scripts.benchmarks.efficiency import PRESETS, all_flops

    flops = all_flops(PRESETS["paper"], (2, 8, 64))
    for views, expected in {2: 802, 8: 2484, 64: 18177}.items():
        assert flops["render"]["recomputing"][views] / 1e9 == pytest.approx(expected, rel=0.01)
    for views, expected in {2: 1739, 8: 9393, 64: 349245}.items():
        assert flops["render"]["lvsm-decoder"][views] / 1e9 == pytest.approx(expected, rel=0.01)


def test_the_cpus_attention_is_counted_too(network):
    from elvsm_nerfstudio.training.flops import count_flops
    from scripts.benchmarks.methods import Scene

    scene, n = Scene.make(3, SIZE, "cpu", 1), (SIZE // CONFIG.patch_size) ** 2
    with torch.no_grad():
        counted = count_flops(lambda: network(scene.first(3), scene.path, scene.frame))
    assert counted == 3 * encode_flops(CONFIG, n) + decode_flops(CONFIG, n, 3)


def test_all_ways_of_ours_give_the_same_pictures(network):
    from scripts.benchmarks.methods import Cached, Recomputing, Scene, Upstream

    scene = Scene.make(4, SIZE, "cpu", path_frames=10)
    pictures = {}
    with torch.no_grad():
        for way in (Cached, Recomputing, Upstream):
            method = way(network)
            known = method.remember(scene, 4)
            pictures[way] = {
                "render": method.render(known, scene, 4),
                "append": method.append(method.fresh(known), scene, 4),
                "path": torch.cat(list(method.path(None, scene, 4)), dim=1),
            }
    for call, expected in pictures[Cached].items():
        assert expected.shape[1] == {"render": 1, "append": 8, "path": 10}[call] and expected.std() > 0.05
        for way in (Recomputing, Upstream):
            assert (pictures[way][call] - expected).abs().max() < 1e-5, (way, call)


def test_what_is_kept_can_be_appended_to_again(network):
    """A timed append finds the same memory in every turn, in one piece and with room."""
    from scripts.benchmarks.methods import Cached, Scene, Upstream

    scene = Scene.make(2, SIZE, "cpu", path_frames=1)
    with torch.no_grad():
        for method in (Cached(network), Upstream(network)):
            known = method.remember(scene, 2)
            first, second = (method.append(method.fresh(known), scene, 2) for _ in range(2))
            assert torch.equal(first, second)
        method = Cached(network)
        known = method.remember(scene, 2)
        fresh = method.fresh(known)
        assert fresh.store is not known.store and fresh.store.room() >= fresh.tokens_per_view[0]
        assert len(network.append(fresh, scene.context.select([2])).runs) == 1


def test_peak_memory_is_exact():
    from scripts.benchmarks.measurements import peak_bytes

    def run(held: list[torch.Tensor]) -> torch.Tensor:
        held.append(torch.empty(1000, dtype=torch.uint8))
        torch.empty(5000, dtype=torch.uint8)  # gone at once
        held.append(torch.empty(3000, dtype=torch.uint8))
        held.clear()
        return torch.empty(100, dtype=torch.uint8)

    assert peak_bytes(torch.device("cpu"), lambda: [torch.empty(9000, dtype=torch.uint8)], run) == 6000


def test_matrix_products_are_recorded_and_replayed():
    from scripts.benchmarks.measurements import GemmReplay, on_meta, recorded_gemms

    with torch.device("meta"):
        layer, x, q = nn.Linear(4, 6, bias=False), torch.empty(3, 5, 4), torch.empty(1, 2, 7, 8)
    with on_meta():
        gemms = recorded_gemms(lambda: (layer(x), nn.functional.scaled_dot_product_attention(q, q, q)))
    assert [tuple(map(tuple, gemm.shapes)) for gemm in gemms] == [
        ((15, 4), (4, 6)), ((2, 7, 8), (2, 8, 7)), ((2, 7, 7), (2, 7, 8)),
    ]  # fmt: skip
    assert gemms[0].strides[1] == (1, 4)  # the weight is read transposed, as it lies
    GemmReplay(gemms, torch.device("cpu"), torch.float32)()


def test_goals_are_judged():
    from scripts.benchmarks.goals import memory_goal, slope_goal, time_ratio_goal

    def row(call: str, method: str, views: int, flops: int, *ms: float, **rest) -> tuple:
        key = call, method, views
        return key, {"flops": flops, "ms": {"median": ms[0]} if ms else None, "ms_runs": list(ms), **rest}

    rows = dict([
        row("render", "cached", 8, 100, 10.0, 12.0), row("render", "upstream", 8, 300, 27.0, 36.0),
        row("render", "upstream", 16, 300), row("render", "cached", 16, 100, 1.0, 1.0),
    ])  # fmt: skip
    goal = time_ratio_goal(rows)
    assert goal["value"] == pytest.approx(0.95) and goal["met"] is True and goal["within"] == "1 of 1"
    assert time_ratio_goal({})["met"] is None and time_ratio_goal({})["value"] is None

    flat = dict(row("render", "cached", n, 100 + 10 * n, 5.0 + 0.5 * n) for n in (1, 2, 4, 8))
    assert slope_goal(flat)["value"] == pytest.approx(1.0) and slope_goal(flat)["met"] is True
    steep = dict(row("render", "cached", n, 100 + 10 * n, 5.0 + 1.0 * n) for n in (1, 2, 4, 8))
    assert slope_goal(steep)["met"] is False

    for peak, met in ((1300, True), (1400, False)):
        rows = dict([row("render", "cached", 64, 1, peak_bytes=200, memory_bytes=800),
                     row("path", "cached", 64, 1, peak_bytes=peak, memory_bytes=None)])  # fmt: skip
        assert memory_goal(rows)["met"] is met and memory_goal(rows)["value"] == peak / 1000


def test_a_tiny_benchmark_runs(tmp_path, monkeypatch, capsys):
    from scripts.benchmarks import efficiency as benchmark_efficiency

    tiny = benchmark_efficiency.Preset(SIZE, CONFIG)
    monkeypatch.setitem(benchmark_efficiency.PRESETS, "paper", tiny)
    monkeypatch.setattr(benchmark_efficiency, "VIEW_COUNTS", (1, 2, 64))
    options = "--preset tiny --max-views 2 --repeats 2 --beside tests --output".split()
    (tmp_path / "page.md").write_text("before\n<!-- efficiency-tiny -->\n<!-- /efficiency-tiny -->\nafter\n")
    page = ["--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["benchmark_efficiency.py", *options, str(tmp_path), *page])
    benchmark_efficiency.main()

    result = json.loads((tmp_path / "benchmark_efficiency.json").read_text())
    assert result["beside"] == "tests" and result["weights"] == "random" and result["machine"]["threads"] > 0
    calls = {"encode": 3, "render": 5, "append": 5, "path": 5}  # methods that have each
    assert len(result["rows"]) == 2 * sum(calls.values())
    for row in result["rows"]:
        assert len(row["ms_runs"]) == 2 and row["ms"]["min"] > 0 and row["peak_bytes"] > 0, row
        assert row["flops"] > 0 or (row["call"], row["method"]) == ("encode", "lvsm-decoder")
    kept = [row for row in result["rows"] if (row["call"], row["method"]) == ("render", "cached")]
    assert [row["memory_bytes"] for row in kept] == [views * 2 * 2 * 16 * 64 * 4 for views in (1, 2)]
    assert set(result["paper_flops"]["append"]["lvsm-decoder"]) == {"1", "2", "64"}
    assert set(result["matmul_rate"]["precisions"]) == {"fp32", "bf16"}
    assert len(result["goals"]) == 7
    for goal in result["goals"]:
        assert goal["goal"] and goal["target"] and goal["met"] in (True, False, None)
    table = (tmp_path / "benchmark_efficiency.md").read_text()
    assert "upstream's algorithm" in table and "beside: tests" in table and "Peak memory" in table
    assert (tmp_path / "benchmark_efficiency.png").stat().st_size > 10_000
    assert "benchmark_efficiency.json" in capsys.readouterr().out
    written = (tmp_path / "page.md").read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "beside: tests" in written
    (line,) = [
        line for line in written.splitlines() if line.startswith("| (b) render 1 view from N: ours, memory kept")
    ]
    ms = [row["ms"] for row in kept]
    cells = f"{ms[0]['median']:,.0f} | {ms[1]['median']:,.0f} ({ms[1]['min']:,.0f} to {ms[1]['max']:,.0f})"
    assert line.endswith(f" | {cells} |")


@pytest.mark.parametrize("preset", ["small", "paper", "paper_amx"])
def test_the_page_shows_the_result_on_record(preset):
    from scripts.benchmarks.tables import page_part

    docs = Path(__file__).parents[2] / "docs"
    result = json.loads((docs / f"results/efficiency_{preset}.json").read_text())
    assert f"\n{page_part(result)}\n" in (docs / "benchmarks.md").read_text()
