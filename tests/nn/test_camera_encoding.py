"""Relative camera encoding: what attention sees of cameras and patches, and nothing else."""

from dataclasses import replace

import pytest
import torch
from conftest import make_views
from test_geometry import move_world
from test_network import SMALL, random_network
from torch.nn import functional as F

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.camera_encoding import CameraEncoding, PatchRotation, projection_matrices
from elvsm_nerfstudio.viewer.attention_maps import decode_with_attention

PROPE = replace(SMALL, camera_encoding="prope")
CAMERA_RAYS = replace(PROPE, ray_frame="camera")


def cameras(num_views: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    views = make_views(1, num_views, 16, 24, seed=seed)
    zoom = 1 + 0.1 * torch.arange(num_views)[:, None]
    return views.camera_to_world, views.intrinsics * zoom


def encoding(num_views: int, grid: tuple[int, int] = (2, 3), seed: int = 0, head_dim: int = 16) -> CameraEncoding:
    rotation = PatchRotation.of(grid, head_dim, torch.device("cpu"), torch.float32)
    return CameraEncoding.of(*cameras(num_views, seed), rotation)


def full_matrix(encoding: CameraEncoding, projection: torch.Tensor, token: int) -> torch.Tensor:
    """D of one view and patch, written out channel by channel from the definition."""
    quarter = encoding.rotation.cos.shape[-1] // 2
    matrix = torch.zeros(4 * quarter, 4 * quarter)
    for block in range(2 * quarter // 4):
        matrix[4 * block : 4 * block + 4, 4 * block : 4 * block + 4] = projection
    cos, sin = encoding.rotation.cos[token], encoding.rotation.sin[token, quarter:]
    for pair in range(quarter):
        first, second = 2 * quarter + pair, 3 * quarter + pair
        matrix[first, first] = matrix[second, second] = cos[pair]
        matrix[first, second], matrix[second, first] = -sin[pair], sin[pair]
    return matrix


def test_projection_matrices_project_and_their_inverses_invert():
    poses, intrinsics = cameras(3)
    projection, inverse = projection_matrices(poses, intrinsics)
    assert torch.allclose(projection @ inverse, torch.eye(4).expand_as(projection), atol=1e-5)
    point = torch.tensor([0.3, -0.2, 0.4, 1.0])
    local = torch.linalg.inv(poses) @ point
    expected = intrinsics[..., :2] * local[..., :2] / local[..., 2:3] + intrinsics[..., 2:] - 0.5
    image = projection @ point
    assert torch.allclose(image[..., :2] / image[..., 2:3], expected, atol=1e-5)
    assert torch.allclose(image[..., 3], torch.ones(1, 3))


def test_attention_is_that_of_the_relative_matrices():
    """Scores q^T D_q D_k^-1 k and sums of D_q D_k^-1 v, with the matrices written out."""
    target, context = encoding(2, (2, 3)), encoding(3, (1, 2), seed=5)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 2 * 6, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 3 * 2, 16, generator=generator)
    out = target.outputs(
        F.scaled_dot_product_attention(target.queries(q), context.keys(k), context.keys(v), scale=0.25)
    )

    def written_out(of: CameraEncoding, num_views: int, seed: int) -> torch.Tensor:
        projection = projection_matrices(*cameras(num_views, seed))[0][0]
        tokens = len(of.rotation.cos)
        return torch.stack([full_matrix(of, projection[i], n) for i in range(num_views) for n in range(tokens)])

    relative = written_out(target, 2, 0)[:, None] @ torch.linalg.inv(written_out(context, 3, 5))[None]
    shares = torch.einsum("bhqi,qkij,bhkj->bhqk", q, relative, k).mul(0.25).softmax(dim=-1)
    assert torch.allclose(out, torch.einsum("bhqk,qkij,bhkj->bhqi", shares, relative, v), atol=1e-3)


def test_a_patch_is_turned_by_its_place_in_the_image_whatever_the_images_size():
    small, large = (PatchRotation.of(grid, 16, torch.device("cpu"), torch.float32) for grid in ((1, 3), (3, 9)))
    centres = [9 + 3 * column + 1 for column in range(3)]  # row 1, columns 1, 4, 7 of the large grid
    assert torch.allclose(small.cos, large.cos[centres], atol=1e-5)
    assert torch.allclose(small.sin, large.sin[centres], atol=1e-5)
    assert not torch.allclose(large.cos[0], large.cos[1], atol=1e-2)
    assert not torch.allclose(large.cos[0], large.cos[9], atol=1e-2)
    x = torch.randn(4, 27, 8)
    assert torch.allclose(large.backward(large.forward(x)), x, atol=1e-5)
    same = torch.randn(16).expand(27, 16)
    turned = torch.cat([same[:, :8], large.backward(same[:, 8:])], dim=-1)
    scores = turned @ turned.T
    assert torch.allclose(scores[0, 10], scores[16, 26], atol=1e-4)  # one row and one column apart
    assert torch.allclose(scores[10, 0], scores[26, 16], atol=1e-4)


@pytest.mark.parametrize("config", [PROPE, CAMERA_RAYS], ids=["canonical rays", "camera rays"])
def test_world_frame_and_order_of_views_do_not_matter(config):
    network = random_network(config)
    context, target = make_views(2, 4, 16, 24), make_views(2, 2, 24, 16, seed=1)
    with torch.no_grad():
        expected = network(context, target)
        assert torch.allclose(network(context.select([2, 0, 3, 1]), target), expected, atol=1e-5)
        moved = (replace(v, camera_to_world=move_world(v.camera_to_world)) for v in (context, target))
        assert torch.allclose(network(*moved), expected, atol=1e-4)
    assert expected.std() > 1e-2


def test_with_camera_rays_only_relative_cameras_matter():
    """Any frame of the same scale gives the same result; with canonical rays the tokens tell frames apart."""
    context, target = make_views(1, 3, 16, 16), make_views(1, 2, 16, 16, seed=1)
    frame = CanonicalFrame.estimate(context.camera_to_world)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    other = CanonicalFrame(frame.axes @ turn, frame.centre + 0.5, frame.scale)
    differences = []
    for config in (CAMERA_RAYS, PROPE):
        network = random_network(config)
        with torch.no_grad():
            differences.append((network(context, target, frame) - network(context, target, other)).abs().max())
    assert differences[0] < 1e-4 < 1e-3 < differences[1]


@pytest.mark.parametrize("config", [PROPE, CAMERA_RAYS], ids=["canonical rays", "camera rays"])
def test_memories_are_exact_while_views_come_and_go(config):
    network = random_network(config)
    context, target = make_views(1, 4, 16, 24), make_views(1, 2, 24, 16, seed=1)
    with torch.no_grad():
        first = network.encode(context.select([0, 1]))
        memory = network.append(first, context.select([2, 3])).drop([1]).select([3, 0, 2])
        again = network.encode(context.select([3, 0, 2]), first.frame)
        assert torch.allclose(network.decode(memory, target), network.decode(again, target), atol=1e-5)
        assert (network.decode(memory, target) - network.decode(first, target)).abs().max() > 1e-2


def test_rays_of_tokens_are_in_the_frame_that_is_asked_for():
    views = make_views(1, 3, 16, 16)
    frame = CanonicalFrame.estimate(views.camera_to_world)
    moved = replace(views, camera_to_world=views.camera_to_world[:, [1, 2, 0]])
    own, canonical = random_network(CAMERA_RAYS), random_network(PROPE)
    rays = own._rays(views, frame)
    assert torch.equal(rays[..., 3:], views.directions) and rays[..., :3].abs().max() == 0  # no moments
    assert torch.equal(own._context_tokens(views, frame), own._context_tokens(moved, frame))
    found = (canonical._context_tokens(views, frame) - canonical._context_tokens(moved, frame)).abs()
    assert found.amax(dim=(2, 3)).min() > 1e-2


def test_cameras_reach_the_result_through_the_encoding_alone():
    network = random_network(CAMERA_RAYS)
    context, target = make_views(1, 3, 16, 16), make_views(1, 1, 16, 16, seed=1)
    frame = CanonicalFrame.estimate(context.camera_to_world)
    with torch.no_grad():
        expected = network(context, target, frame)
        for change in (
            replace(target, camera_to_world=context.camera_to_world[:, :1]),
            replace(target, intrinsics=target.intrinsics * 1.3),
        ):
            assert (network(context, change, frame) - expected).abs().max() > 1e-3


def test_attention_maps_are_those_of_what_was_decoded():
    network = random_network(PROPE)
    context, target = make_views(1, 3, 16, 16), make_views(1, 2, 16, 24, seed=1)
    with torch.no_grad():
        memory = network.append(network.encode(context), make_views(1, 1, 24, 16, seed=2)).select([3, 0, 2])
        rgb, shares = decode_with_attention(network, memory, target)
        assert torch.equal(rgb, network.decode(memory, target))
        assert torch.allclose(shares.sum(dim=-1), torch.ones(1, 2, 2, 3), atol=1e-5)
        without = network.append(network.encode(context), make_views(1, 1, 24, 16, seed=2)).select([3, 0, 2])
        for keys, _ in without.store.layers:
            keys.zero_()  # then every token gets the same share
        _, even = decode_with_attention(network, without, target)
    assert torch.allclose(even, torch.tensor([6 / 14, 4 / 14, 4 / 14]).expand_as(even), atol=1e-5)
    assert (shares - even).abs().max() > 0.02


def test_bf16_stays_close_to_fp32_and_gradients_are_finite():
    network = random_network(PROPE)
    context, target = make_views(1, 3, 16, 16), make_views(1, 1, 16, 16, seed=1)
    exact = network(context, target)
    exact.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in network.parameters())
    with torch.no_grad():
        network.autocast_dtype = torch.bfloat16
        memory = network.encode(context)
        rounded = network.decode(memory, target)
    assert memory.dtype == torch.bfloat16
    assert 1e-6 < (rounded - exact).abs().max() < 0.1


def test_encodings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="head_dim 4: camera_encoding 'prope' needs a multiple of 8"):
        random_network(replace(PROPE, head_dim=4))
    with pytest.raises(ValueError, match="ray_frame 'camera' without camera_encoding hides all poses"):
        random_network(replace(SMALL, ray_frame="camera"))


def test_the_encoding_has_no_weights_and_is_part_of_the_architecture():
    plain, prope = random_network(), random_network(PROPE)
    assert list(plain.state_dict()) == list(prope.state_dict())
    assert plain.fingerprint() != prope.fingerprint()
    assert prope.architecture == plain.architecture[:-1] + ", camera encoding prope)"
    camera_rays = random_network(CAMERA_RAYS)
    assert camera_rays.architecture == prope.architecture[:-1] + ", rays in the frame camera)"
    assert camera_rays.fingerprint() != prope.fingerprint()
