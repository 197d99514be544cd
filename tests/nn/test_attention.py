"""nn/kernels.py: the same attention whichever kernel computes it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from elvsm_nerfstudio.nn.kernels import BLOCK, attention


@pytest.mark.parametrize("queries", [5, BLOCK, 2 * BLOCK + 3])
def test_bf16_on_a_cpu_is_attention_to_its_precision(queries):
    torch.manual_seed(0)
    shapes = [(2, 3, n, 16) for n in (queries, 70, 70)]
    exact = [torch.randn(shape).bfloat16().double().requires_grad_() for shape in shapes]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected = F.scaled_dot_product_attention(*exact)
    found = attention(*rounded)
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
