"""What only a CUDA device can show; run with `pytest -m gpu`."""

import pytest
import torch
from conftest import make_views
from nerfstudio.cameras.cameras import Cameras, CameraType
from test_precision import TOLERANCES, network_and_views

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.kernels import layer_norm, rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES.items(), ids=["TF32", "bf16"])
@torch.no_grad()
def test_cuda_renders_what_the_cpu_renders(dtype, tolerance):
    network, context, target = network_and_views()
    expected = network(context, target)
    network.to("cuda").autocast_dtype = dtype
    assert (network(context.to("cuda"), target.to("cuda")).cpu() - expected).abs().max() < tolerance


def test_a_training_step_at_the_papers_size():
    network = EfficientLVSM(EfficientLVSMConfig(), torch.bfloat16).to("cuda")
    context, target = (views.to("cuda") for views in (make_views(2, 2, 256, 256), make_views(2, 6, 256, 256, seed=1)))
    (network(context, target) - target.rgb).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_normalised_channels_keep_their_precision_under_autocast():
    x = torch.randn(2, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gain = torch.rand(64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = rms_norm(x, gain, 1e-6)
        assert layer_norm(x).dtype == layer_norm(x, gain).dtype == torch.bfloat16
    assert found.dtype == torch.bfloat16
    expected = rms_norm(x.detach().float().cpu(), gain.cpu(), 1e-6)
    assert torch.allclose(found.float().cpu(), expected, atol=0.03)


def test_rays_are_made_there():
    cameras = Cameras(
        torch.eye(4)[:3].expand(2, 3, 4), 40.0, 40.0, 32.0, 32.0, 64, 64, torch.zeros(2, 6),
        camera_type=torch.tensor([[CameraType.PERSPECTIVE.value], [CameraType.FISHEYE.value]]),
    )  # fmt: skip
    expected = views_from_cameras(cameras, 8)
    found = views_from_cameras(cameras.to("cuda"), 8)
    for name in ("directions", "camera_to_world", "intrinsics"):
        assert torch.allclose(getattr(found, name).cpu(), getattr(expected, name), atol=1e-5)
