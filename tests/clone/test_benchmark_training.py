"""The plain transcription computes what ours does, and the benchmark compares like with like."""

import json

import pytest
import torch
from conftest import run_cli
from PIL import Image

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.kernels import rms_norm
from elvsm_nerfstudio.nn.published_weights import from_published
from scripts.benchmarks.training import PRESETS, Batch, TheirStep, variants


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.make(PRESETS["test"], torch.device("cpu"))


def test_the_transcription_has_our_render_and_gradients(batch):
    torch.manual_seed(0)
    network = PRESETS["test"].network.build()
    theirs = TheirStep(network, batch)
    image, *cameras, target = theirs.inputs
    rendered = theirs.step.render(image, *cameras)
    ours = network(batch.context, batch.target, CanonicalFrame.estimate(batch.context.camera_to_world))
    assert torch.allclose(rendered.permute(0, 1, 3, 4, 2), ours, atol=1e-5)
    (rendered - target).square().mean().backward()
    (ours - batch.target.rgb).square().mean().backward()
    gradients, _ = from_published({name: p.grad for name, p in theirs.step.network.named_parameters()})
    for name, parameter in network.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < 1e-4 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_all_variants_take_the_same_step(batch, precision, tolerance):
    losses = {}
    for name in variants(PRESETS["test"], batch, precision, compiled=False):
        with variants(PRESETS["test"], batch, precision, compiled=False)[name].active() as step:
            losses[name] = [step(batch), step(batch)]
    for name, found in losses.items():
        assert found == pytest.approx(losses["ours"], rel=tolerance), name
        assert found[1] != found[0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_written_by_hand_are_autograds(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def compare(ours, theirs, inputs, along):
        mine = [x.to(dtype).requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in mine]
        out, reference = ours(*mine), theirs(*exact)
        assert out.dtype == dtype and torch.allclose(out.double(), reference, rtol=tolerance, atol=tolerance)
        for a, b in zip(torch.autograd.grad(out, mine, along.to(dtype)), torch.autograd.grad(reference, exact, along)):
            assert a.dtype == dtype and (a.double() - b).abs().max() < tolerance * b.abs().max()

    def plain(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    x, along = made(2, 5, 3, 3, 8), made(2, 5, 3, 8)
    compare(lambda x, g: rms_norm(x[:, :, 1], g, 1e-5), lambda x, g: plain(x[:, :, 1], g), (x, made(8)), along)


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
