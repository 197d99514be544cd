"""The rasterizer for machines without CUDA: against a dense reference, gsplat's own functions, and gsplat's kernels."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from elvsm_nerfstudio.splatting.compositing import tile_bounds
from elvsm_nerfstudio.splatting.cpu_rasterizer import rasterization
from elvsm_nerfstudio.splatting.rasterization import choose_backend

WIDTH, HEIGHT = 45, 37
NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats")


def scene(count: int = 60, seed: int = 0, cameras: int = 1) -> dict[str, Tensor]:
    """Gaussians in front of off-centre cameras with unequal focal lengths, some opaque, some thin, one at the centre of
    the first camera."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    means = (draw(count, 3) - 0.5) * torch.tensor([3.0, 2.5, 2.0])
    viewmats = torch.eye(4).repeat(cameras, 1, 1)
    for camera in range(cameras):
        angle = torch.tensor(0.3 * camera + 0.1)
        viewmats[camera, :3, :3] = torch.tensor(
            [[angle.cos(), 0, angle.sin()], [0, 1, 0], [-angle.sin(), 0, angle.cos()]]
        )
        viewmats[camera, :3, 3] = torch.tensor([0.1, -0.05, 2.5 + 0.2 * camera])
    means[1:4] *= 0.1
    means[0] = -viewmats[0, :3, :3].T @ viewmats[0, :3, 3]
    opacities = (0.05 + draw(count)).clamp(max=1.0)
    opacities[1:4] = 1.0
    return {
        "means": means,
        "quats": draw(count, 4) - 0.5,
        "scales": 0.02 + 0.35 * draw(count, 3) ** 2,
        "opacities": opacities,
        "colors": 0.8 * (draw(count, 4, 3) - 0.5),
        "viewmats": viewmats,
        "Ks": torch.tensor([[40.0, 0, 20.3], [0, 44.0, 18.9], [0, 0, 1]]).repeat(cameras, 1, 1),
    }


def render(inputs: dict[str, Tensor], function=rasterization, **options):
    options = {"sh_degree": 1, "packed": False, "render_mode": "RGB+ED", "absgrad": True, **options}
    return function(**inputs, width=WIDTH, height=HEIGHT, **options)


def dense(inputs: dict[str, Tensor], antialiased: bool) -> Tensor:
    """Colours, expected depth and alpha [camera, height, width, 5], written out from gsplat 1.4.0's kernels."""
    v = {name: tensor.double() for name, tensor in inputs.items()}
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    images = []
    for viewmat, K in zip(v["viewmats"], v["Ks"]):
        rotation, shift = viewmat[:3, :3], viewmat[:3, 3]
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        local = v["means"] @ rotation.T + shift
        transmittance, image = torch.ones(HEIGHT, WIDTH).double(), torch.zeros(HEIGHT, WIDTH, 5).double()
        alive = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
        for i in local[:, 2].argsort().tolist():
            px, py, pz = local[i]
            if pz < 0.01:
                continue
            w, a, b, c = v["quats"][i] / v["quats"][i].norm()
            turn = torch.stack([
                torch.stack([1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)]),
                torch.stack([2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)]),
                torch.stack([2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)]),
            ])  # fmt: skip
            half = rotation @ turn * v["scales"][i]
            tx = pz * (px / pz).clamp(-(cx / fx + 0.15 * WIDTH / fx), (WIDTH - cx) / fx + 0.15 * WIDTH / fx)
            ty = pz * (py / pz).clamp(-(cy / fy + 0.15 * HEIGHT / fy), (HEIGHT - cy) / fy + 0.15 * HEIGHT / fy)
            zero = torch.zeros_like(pz)
            jacobian = torch.stack([torch.stack([fx / pz, zero, -fx * tx / pz**2]),
                                    torch.stack([zero, fy / pz, -fy * ty / pz**2])])  # fmt: skip
            sharp = jacobian @ half @ half.T @ jacobian.T
            blurred = sharp + 0.3 * torch.eye(2).double()
            middle = (blurred[0, 0] + blurred[1, 1]) / 2
            largest = middle + (middle**2 - blurred.det()).clamp(min=0.01).sqrt()
            radius = float(torch.ceil(3 * largest.detach().sqrt()))
            u, t = fx * px / pz + cx, fy * py / pz + cy
            if u + radius <= 0 or u - radius >= WIDTH or t + radius <= 0 or t - radius >= HEIGHT:
                continue
            columns, rows = ((float(p) - radius) // 16 * 16 for p in (u, t))
            ends = (-(-(float(p) + radius) // 16) * 16 for p in (u, t))
            end_column, end_row = ends
            seen = (x > columns) & (x < end_column) & (y > rows) & (y < end_row)
            opacity = v["opacities"][i]
            if antialiased:
                opacity = opacity * (sharp.det() / blurred.det()).sqrt()
            conic = torch.linalg.inv(blurred)
            dx, dy = u - x, t - y
            sigma = 0.5 * (conic[0, 0] * dx**2 + conic[1, 1] * dy**2) + conic[0, 1] * dx * dy
            alpha = (opacity * (-sigma).exp()).clamp(max=0.999)
            seen = seen & (alpha >= 1 / 255)
            left = transmittance * (1 - alpha)
            alive = alive & ~(seen & (left <= 1e-4))
            seen = seen & alive
            direction = v["means"][i] - torch.linalg.inv(viewmat)[:3, 3]
            direction = direction / direction.norm()
            linear = 0.4886025119029199 * torch.stack([-direction[1], direction[2], -direction[0]])
            bands = torch.cat([torch.tensor([0.28209479177387814]).double(), linear])
            paint = torch.cat([(bands @ v["colors"][i] + 0.5).clamp(min=0), torch.stack([pz, torch.ones_like(pz)])])
            image = image + (alpha * transmittance * seen)[..., None] * paint
            transmittance = torch.where(seen, left, transmittance)
        depth = image[..., 3:4] / image[..., 4:].clamp(min=1e-10)
        images.append(torch.cat([image[..., :3], depth, image[..., 4:]], dim=-1))
    return torch.stack(images)


def gradients(inputs: dict[str, Tensor], picture) -> dict[str, Tensor]:
    """Of a loss that weighs every pixel and channel differently."""
    leaves = {name: tensor.clone().requires_grad_(name in NAMES) for name, tensor in inputs.items()}
    image = picture(leaves)
    # Expected depth is a quotient without meaning where next to nothing is seen.
    weight = torch.randn(image.shape, generator=torch.Generator().manual_seed(9)) * (image[..., 4:].detach() > 0.1)
    (image * weight).sum().backward()
    return {name: leaves[name].grad for name in NAMES}


def picture_of(function=rasterization, **options):
    def picture(inputs: dict[str, Tensor]) -> Tensor:
        colors, alphas, _ = render(inputs, function, **options)
        return torch.cat([colors, alphas], dim=-1)

    return picture


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
@pytest.mark.parametrize("seed", [0, 1])
def test_pictures_and_gradients_are_those_of_the_dense_reference(mode, seed):
    inputs = scene(seed=seed, cameras=2)
    image, expected = picture_of(rasterize_mode=mode)(inputs), dense(inputs, mode == "antialiased")
    covered = expected[..., 4] > 0.1
    assert 0.2 < covered.double().mean() < 0.98 and (expected[..., 4] > 0.99).any()
    error = (image - expected).abs()[covered]
    # An alpha that sits on a threshold falls on either side.
    assert error.quantile(0.999) < 2e-5 and error[:, [0, 1, 2, 4]].max() < 5e-3

    found = gradients(inputs, picture_of(rasterize_mode=mode))
    wanted = gradients(inputs, lambda leaves: dense(leaves, mode == "antialiased"))
    for name in NAMES:
        assert found[name].isfinite().all(), name
        scale = wanted[name].abs().max()
        difference = (found[name] - wanted[name]).abs() / scale
        assert difference.quantile(0.98) < 1e-4, (name, difference.max())


def test_gradients_agree_with_finite_differences():
    inputs = {name: tensor.double() for name, tensor in scene(count=8, seed=4).items()}
    inputs["opacities"] = inputs["opacities"] * 0.5
    fixed = inputs.pop("Ks")

    def colors(*values: Tensor) -> Tensor:
        image = render({**dict(zip(inputs, values)), "Ks": fixed}, render_mode="RGB+D")[0]
        # Steps at the least alpha are no part of the gradient.
        return image[:, 8:30:4, 6:40:5]

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(colors, leaves, eps=1e-7, atol=2e-3, rtol=2e-3, fast_mode=True)


def test_absolute_gradients_of_the_means():
    """Of a single pixel's loss they are the gradients' absolute values, and over pixels they add up."""
    inputs = scene()
    total = torch.zeros(1, 60, 2)
    for pixel in ((10, 12), (20, 30), (21, 30)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        image, _, meta = render(leaves)
        meta["means2d"].retain_grad()
        image[0, pixel[0], pixel[1], 0].backward()
        torch.testing.assert_close(meta["means2d"].absgrad, meta["means2d"].grad.abs(), atol=1e-7, rtol=1e-4)
        total += meta["means2d"].absgrad
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    image, _, meta = render(leaves)
    (image[0, 10, 12, 0] + image[0, 20, 30, 0] - image[0, 21, 30, 0]).backward()
    torch.testing.assert_close(meta["means2d"].absgrad, total, atol=1e-6, rtol=1e-4)


def test_projection_is_gsplats():
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    inputs = scene(count=300, cameras=2)
    covars, _ = _quat_scale_to_covar_preci(inputs["quats"], inputs["scales"], compute_preci=False)
    expected = _fully_fused_projection(inputs["means"], covars, inputs["viewmats"], inputs["Ks"], WIDTH, HEIGHT)
    meta = render(inputs)[2]
    assert torch.equal(meta["radii"], expected[0]) and 100 < int((meta["radii"] > 0).sum()) < 600
    seen = meta["radii"] > 0
    for name, tensor in zip(("means2d", "depths", "conics"), expected[1:4]):
        torch.testing.assert_close(meta[name][seen], tensor[seen], atol=2e-5, rtol=1e-4)
    clipped = render(inputs, radius_clip=6.0)[2]["radii"]
    assert torch.equal(clipped, torch.where(expected[0] > 6, expected[0], 0))


def test_tiles_are_gsplats():
    from gsplat.cuda._torch_impl import _isect_tiles

    meta = render(scene(count=80, cameras=2))[2]
    sizes = meta["tile_width"], meta["tile_height"]
    assert sizes == (3, 3)
    parts = (meta[name].detach() for name in ("means2d", "radii", "depths"))
    per_gaussian, ids, gaussians = _isect_tiles(*parts, 16, *sizes)
    assert torch.equal(meta["tiles_per_gauss"], per_gaussian)
    first, last = tile_bounds(meta["means2d"].detach(), meta["radii"], 16, WIDTH, HEIGHT)
    ours = []
    for camera in range(2):
        order = meta["depths"][camera].argsort(stable=True).tolist()
        for row in range(3):
            for column in range(3):
                tile = torch.tensor([column, row])
                ours += [camera * 80 + i for i in order
                         if (first[camera, i] <= tile).all() and (tile < last[camera, i]).all()]  # fmt: skip
    assert gaussians.tolist() == ours


def test_backgrounds_and_depth_alone():
    inputs = scene()
    color, alpha, _ = render(inputs, render_mode="RGB")
    background = torch.tensor([[0.2, 0.5, 0.9]])
    behind, _, _ = render(inputs, render_mode="RGB+D", backgrounds=background)
    torch.testing.assert_close(behind[..., :3], color + (1 - alpha) * background)
    depth, _, _ = render(inputs, render_mode="D", backgrounds=background)
    assert torch.equal(depth, behind[..., 3:])
    plain = {**inputs, "colors": torch.rand(60, 7)}
    assert render(plain, sh_degree=None, render_mode="RGB")[0].shape == (1, HEIGHT, WIDTH, 7)


def test_nothing_to_see():
    inputs = scene()
    inputs["means"] = inputs["means"] - 100 * inputs["viewmats"][0, 2, :3]
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    image, alpha, meta = render(leaves, render_mode="RGB")
    assert image.abs().max() == alpha.max() == meta["radii"].max() == 0
    image.sum().backward()
    assert all(leaves[name].grad is None or leaves[name].grad.abs().max() == 0 for name in NAMES)


def test_signature_is_gsplats():
    from gsplat import rasterization as gsplats

    ours, theirs = (inspect.signature(function).parameters for function in (rasterization, gsplats))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize(
    "option", [{"packed": True}, {"sparse_grad": True}, {"distributed": True}, {"camera_model": "fisheye"}]
)
def test_what_it_cannot_do_is_refused(option):
    with pytest.raises(NotImplementedError, match=f"{next(iter(option))}.*gsplat"):
        render(scene(), **option)


def test_backend_is_chosen_and_refused():
    assert choose_backend("auto", "cpu") == choose_backend("cpu", "cpu") == choose_backend("cpu", "cuda") == "cpu"
    with pytest.raises(RuntimeError, match="--pipeline.model.backend gsplat: found device cpu"):
        choose_backend("gsplat", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_gsplat_without_a_gpu_builds_nothing():
    code = (
        "import sys, torch\n"
        "from elvsm_nerfstudio.splatting.cpu_rasterizer import rasterization\n"
        "from elvsm_nerfstudio.splatting.rasterization import choose_backend\n"
        "for device in ('cpu', 'cuda'):\n"
        "    for wanted in ('auto', 'gsplat'):\n"
        "        try: print(choose_backend(wanted, device))\n"
        "        except RuntimeError as error: print('refused')\n"
        "one = torch.ones(1, 3)\n"
        "pose, K = torch.eye(4)[None], torch.tensor([[[9.0, 0, 8], [0, 9, 8], [0, 0, 1]]])\n"
        "rasterization(one, torch.ones(1, 4), one, one[:, 0], one, pose, K, 16, 16, packed=False)\n"
        "print('gsplat.cuda._backend' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["cpu", "refused", "refused", "refused", "False"], done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_pictures_and_gradients_are_those_of_gsplats_kernels(mode):
    from gsplat import rasterization as gsplats

    inputs = {name: tensor.cuda() for name, tensor in scene(count=400, cameras=2).items()}
    pictures = [picture_of(function, rasterize_mode=mode)(inputs) for function in (rasterization, gsplats)]
    error = (pictures[0] - pictures[1]).abs()[pictures[1][..., 4] > 0.1]
    assert error.quantile(0.999) < 1e-3 and error.quantile(0.99) < 1e-4
    found, wanted = (gradients_on_gpu(inputs, picture_of(f, rasterize_mode=mode)) for f in (rasterization, gsplats))
    for name in NAMES:
        difference = (found[name] - wanted[name]).abs() / wanted[name].abs().max()
        assert difference.quantile(0.98) < 1e-3, name


def gradients_on_gpu(inputs: dict[str, Tensor], picture) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_(name in NAMES) for name, tensor in inputs.items()}
    image = picture(leaves)
    weight = torch.randn(image.shape, generator=torch.Generator().manual_seed(9)).to(image)
    (image * weight * (image[..., 4:].detach() > 0.1)).sum().backward()
    return {name: leaves[name].grad for name in NAMES}
