"""nn/layers.py: the blocks' parts are what the paper says, each against its formula."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import nn

from elvsm_nerfstudio.nn.layers import MLP, PatchHead, PatchTokenizer


def mlp_of(dtype: torch.dtype = torch.float64) -> tuple[MLP, torch.Tensor]:
    torch.manual_seed(0)
    return MLP(8, ratio=4).to(dtype), 3 * torch.randn(2, 5, 8, dtype=dtype)


def test_gelu_is_the_exact_one():
    """By the error function; the one by tanh is up to 5e-4 away."""
    mlp, x = mlp_of()
    hidden = x @ mlp[0].weight.T
    expected = (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ mlp[2].weight.T
    assert torch.allclose(mlp(x), expected, atol=1e-12)
    tanh = nn.functional.gelu(hidden, approximate="tanh") @ mlp[2].weight.T
    assert (tanh - expected).abs().max() > 1e-5


def test_gradients_of_both_weights_of_the_mlp_are_autograds():
    mlp, x = mlp_of()
    x.requires_grad_()
    along = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = x, mlp[0].weight, mlp[2].weight
    expected = torch.autograd.grad(nn.functional.gelu(x @ inputs[1].T) @ inputs[2].T, inputs, along)
    for found, wanted in zip(torch.autograd.grad(mlp(x), inputs, along), expected):
        assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_on_the_mlps_parts_are_called_and_its_parts_can_be_replaced(gradients):
    class LowRank(nn.Module):
        """Adds a product of two small matrices to a linear layer, as LoRA does."""

        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.linear, self.a, self.b = linear, nn.Linear(32, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x):
            return self.linear(x) + self.b(self.a(x))

    mlp, x = mlp_of(torch.float32)
    called = []
    for part in mlp:
        part.register_forward_hook(lambda module, inputs, output: called.append(type(module).__name__))
    with torch.set_grad_enabled(gradients):
        mlp(x)
        assert called == ["Linear", "GELU", "Linear"]
        before = mlp(x)
        mlp[2] = LowRank(mlp[2])
        added = mlp(x) - before
    hidden = nn.functional.gelu(x @ mlp[0].weight.T)
    assert torch.allclose(added, hidden @ mlp[2].a.weight.T @ mlp[2].b.weight.T, atol=1e-5)
    if gradients:
        mlp(x).sum().backward()
        assert mlp[2].b.weight.grad.abs().max() > 0


def test_colours_are_made_in_fp32():
    """Under bf16 autocast too: rounded to its 8 bits, a bright colour would be 1/256 off."""
    torch.manual_seed(0)
    head, tokens = PatchHead(32, patch_size=2), torch.randn(1, 3, 6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rgb = head(tokens, 4, 6)
        logits = nn.functional.linear(head.norm(tokens), head.weight)
    assert rgb.dtype == torch.float32 and logits.dtype == torch.bfloat16
    expected = rearrange(
        torch.sigmoid(logits.double()), "s v (h w) (p q c) -> s v (h p) (w q) c", h=2, w=3, p=2, q=2, c=3
    )
    assert (rgb - expected).abs().max() < 1e-6
    assert (rgb.bfloat16() == rgb).float().mean() < 0.2


def test_a_patch_is_row_then_column_then_channel():
    tokenizer, maps = PatchTokenizer(channels=2, patch_size=2, width=8), torch.randn(1, 4, 6, 2)
    with torch.no_grad():
        tokenizer.weight.copy_(torch.eye(8))
        patch = tokenizer(maps)[0, 4]  # of the second row, the second
    assert torch.equal(patch, maps[0, 2:4, 2:4].flatten())
