"""nn/kernels.py: attention and norms are the plain operations, whichever kernel computes them, and so are gradients."""

from __future__ import annotations

import pytest
import torch
from pretended_cuda import pretended_cuda, without_a_gpu
from torch import Tensor
from torch.nn import functional as F

from elvsm_nerfstudio.nn import kernels
from elvsm_nerfstudio.nn.kernels import BLOCK, attention, layer_norm, recomputed, rms_norm
from elvsm_nerfstudio.nn.layers import LayerNorm, RMSNorm

EPS = 1e-5  # of the official code, in every norm
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def plain_rms_norm(x: Tensor, gain: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def plain_layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


# Attention


@pytest.mark.parametrize("amx, heads_at_once", [(False, 1), (False, 4), (False, 6), (True, 1)])
@pytest.mark.parametrize("queries", [5, BLOCK, 2 * BLOCK + 3])
def test_bf16_on_a_cpu_is_attention_to_its_precision(queries, amx, heads_at_once, monkeypatch):
    """By PyTorch's kernel where there is AMX; else in parts of one head, of the two sequences' 6 heads as 4 and 2, and
    of all at once."""
    monkeypatch.setattr(kernels, "HAS_AMX", amx)
    monkeypatch.setattr(kernels, "SCORES", heads_at_once * min(BLOCK, queries) * 70)
    torch.manual_seed(0)
    shapes = [(2, 3, n, 16) for n in (queries, 70, 70)]
    exact = [torch.randn(shape).bfloat16().double().requires_grad_() for shape in shapes]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected = F.scaled_dot_product_attention(*exact)
    found = attention(*rounded)
    assert ("InBlocks" in found.grad_fn.name()) is not amx
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.02
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, rounded, weights.bfloat16()), torch.autograd.grad(expected, exact, weights)
    ):
        assert (mine - theirs).norm() / theirs.norm() < 0.01


def test_fp32_is_exact():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    expected = torch.softmax(q.double() @ k.double().mT / 4, dim=-1) @ v.double()
    assert (attention(q, k, v) - expected).abs().max() < 1e-6


# Norms


def normed_and_gradients(norm, dtype: torch.dtype) -> list[Tensor]:
    """The result for channels that lie apart in memory, and the gradients of x and of the gain."""
    generator = torch.Generator().manual_seed(0)
    x, gain, along = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)
        for shape in ((2, 5, 3, 3, 8), (8,), (2, 5, 3, 8))
    )
    x, gain = x.to(dtype).requires_grad_(), gain.to(dtype).requires_grad_()
    out = norm(x[:, :, 1], gain)
    return [out, *torch.autograd.grad(out, (x, gain), along.to(dtype))]


@pytest.mark.parametrize("part", ["result", "gradient of x", "gradient of the gain"])
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_rms_norm_and_its_gradients_are_the_formulas(dtype, tolerance, part):
    index = ["result", "gradient of x", "gradient of the gain"].index(part)
    found = normed_and_gradients(rms_norm, dtype)[index]
    expected = normed_and_gradients(plain_rms_norm, torch.float64)[index]
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("norm", ["rms_norm", "RMSNorm", "layer_norm", "LayerNorm", "LayerNorm with a gain"])
def test_eps_of_every_norm_is_the_official_codes(norm):
    """Of channels about as small as its square root, at which 1e-6 and 1e-2 are something else."""
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)) * EPS**0.5
    found = {
        "rms_norm": lambda: rms_norm(x, torch.ones(16)),
        "RMSNorm": lambda: RMSNorm(16)(x),
        "layer_norm": lambda: layer_norm(x),
        "LayerNorm": lambda: LayerNorm(16, gain=False)(x),
        "LayerNorm with a gain": lambda: LayerNorm(16, gain=True)(x),
    }[norm]()
    plain = plain_layer_norm if "ayer" in norm else lambda x, eps: plain_rms_norm(x, torch.ones(16), eps)
    assert torch.allclose(found, plain(x, EPS), atol=1e-5)
    for other in (1e-6, 1e-2):
        assert (plain(x, other) - found).abs().max() > 0.1


@without_a_gpu
@pytest.mark.parametrize("norm", [rms_norm, layer_norm, lambda x, gain: layer_norm(x)])
def test_norms_keep_bf16_off_the_cpu(norm):
    """Autocast would give fp32, and have the next layer keep that for its gradients."""
    x, gain = torch.randn(3, 4, 16).bfloat16(), torch.rand(16)
    expected = norm(x, gain)
    with pretended_cuda() as device, torch.autocast("cuda", torch.bfloat16):
        assert F.layer_norm(x.to(device), (16,)).dtype == torch.float32
        found = norm(x.to(device), gain.to(device))
        assert found.is_cuda and found.dtype == torch.bfloat16
        assert torch.allclose(found.cpu().float(), expected.float(), atol=0.03)


# Recomputing


def test_what_is_recomputed_is_not_kept():
    def kept(function) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            function()
        return sum(storages.values())

    x = torch.randn(1000, requires_grad=True)
    assert kept(lambda: x.exp().sin().cos()) == 2000
    assert kept(lambda: recomputed(lambda y: y.exp().sin().cos(), x)) == 1000
    (expected,) = torch.autograd.grad(x.exp().sin().cos().sum(), x)
    (found,) = torch.autograd.grad(recomputed(lambda y: y.exp().sin().cos(), x).sum(), x)
    assert torch.equal(found, expected)
