"""bf16 autocast and TF32 against fp32, on the CPU, with the same weights."""

from contextlib import nullcontext

import pytest
import torch
from conftest import make_views
from torch.utils._python_dispatch import TorchDispatchMode

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig

aten = torch.ops.aten
TOLERANCES = {None: 5e-4, torch.bfloat16: 8e-3}
"""How far a GPU's images may be from the CPU's in fp32 (tests/test_gpu.py): four times what rounding to TF32 and bf16
makes of them here, for kernels that add and round in another order."""


class InTF32(TorchDispatchMode):
    """Rounds what goes into matrix products and attention to the 10 bits that TF32 keeps."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (aten.mm, aten.bmm, aten._scaled_dot_product_flash_attention_for_cpu):
            bits = [x.contiguous().view(torch.int32) for x in args if isinstance(x, torch.Tensor)]
            rounded = [((x + 0x1000) & ~0x1FFF).view(torch.float32) for x in bits]
            args = (*rounded, *args[len(rounded) :])
        return function(*args, **(kwargs or {}))


def network_and_views():
    """Those of tests/test_gpu.py."""
    torch.manual_seed(0)
    network = EfficientLVSMConfig(width=128, num_layers=4).build()
    return network, make_views(2, 3, 64, 64), make_views(2, 2, 64, 64, seed=1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_a_gpus_tolerance_is_four_times_the_rounding(dtype):
    network, context, target = network_and_views()
    exact = network(context, target)
    network.autocast_dtype = dtype
    with InTF32() if dtype is None else nullcontext():
        found = network(context, target)
    assert exact.std() > 0.05 and 0.1 < 4 * (found - exact).abs().max() / TOLERANCES[dtype] <= 1.1


def test_bf16_renders_and_learns_as_fp32_up_to_its_rounding():
    """bf16 keeps 8 bits: renders agree to 0.015 of the range of colours (measured 0.0064; mean 0.0010, where colours
    vary by 0.18), gradients point the same way."""
    torch.manual_seed(0)
    network = EfficientLVSMConfig(width=64, num_layers=3, head_dim=16, init_std=0.1).build()
    context, target = make_views(2, 3, 32, 32), make_views(2, 2, 32, 32, seed=1)
    frame = CanonicalFrame.estimate(context.camera_to_world)
    renders, gradients = [], []
    for dtype in (None, torch.bfloat16):
        network.autocast_dtype = dtype
        network.zero_grad()
        rgb = network(context, target, frame)
        (rgb - target.rgb).square().mean().backward()
        renders.append(rgb.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert renders[1].dtype == torch.float32 and gradients[1].dtype == torch.float32
    assert renders[0].std() > 0.05
    difference = (renders[0] - renders[1]).abs()
    assert 0 < difference.max() < 0.015 and difference.mean() < 0.003
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    assert abs(gradients[1].norm() / gradients[0].norm() - 1) < 0.02
