"""What only a CUDA device can show; run with `pytest -m gpu`."""

import pytest
import torch
from conftest import make_views

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-3), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
def test_cuda_renders_what_the_cpu_renders(dtype, tolerance):
    torch.manual_seed(0)
    network = EfficientLVSM(EfficientLVSMConfig(width=128, num_layers=4))
    context, target = make_views(2, 3, 64, 64), make_views(2, 2, 64, 64, seed=1)
    with torch.no_grad():
        expected = network(context, target)
        network.to("cuda").autocast_dtype = dtype
        assert (network(context.to("cuda"), target.to("cuda")).cpu() - expected).abs().max() < tolerance


def test_a_training_step_at_the_papers_size():
    network = EfficientLVSM(EfficientLVSMConfig(), torch.bfloat16).to("cuda")
    context, target = (views.to("cuda") for views in (make_views(2, 2, 256, 256), make_views(2, 6, 256, 256, seed=1)))
    (network(context, target) - target.rgb).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
