"""Every metric against an implementation of its own, written here from its definition."""

import importlib.util
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from scipy import ndimage

from elvsm_nerfstudio.evaluation import metrics

RELUS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
"""The layers of torchvision's features that LPIPS compares."""
ARCHITECTURES = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}


def images(height: int = 24, width: int = 20, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and truth; the prediction leaves [0, 1] here and there."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(height, width, 3, generator=generator)
    return (truth + noise * torch.randn(height, width, 3, generator=generator)), truth


def forget() -> None:
    """What the module remembers between calls."""
    metrics._lpips_network.cache_clear()
    metrics._warn_once.cache_clear()


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


@pytest.fixture(scope="module")
def random_states() -> dict[str, dict[str, torch.Tensor]]:
    """Networks whose layers all have something to say; classifiers of zeros."""
    generator = torch.Generator().manual_seed(0)
    states = {}
    for net, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            state = architecture(weights=None).state_dict()
        for name, tensor in state.items():
            if name.startswith("classifier"):
                state[name] = torch.zeros(()).expand(tensor.shape)
            else:
                scale = math.sqrt(2 / tensor[0].numel()) if tensor.ndim == 4 else 0.1
                state[name] = scale * torch.randn(tensor.shape, generator=generator)
        states[net] = state
    return states


@pytest.fixture
def random_weights(torch_home, random_states) -> dict[str, dict[str, torch.Tensor]]:
    """The random networks, where LPIPS looks for the true ones."""
    (torch_home / "hub/checkpoints").mkdir(parents=True)
    for net, state in random_states.items():
        torch.save(state, torch_home / "hub/checkpoints" / metrics.LPIPS_WEIGHTS[net])
    return random_states


def test_psnr_is_that_of_clamped_colours():
    prediction, truth = images()
    expected = 10 * math.log10(1 / ((prediction.clamp(0, 1) - truth) ** 2).mean().item())
    assert float(metrics.psnr(prediction, truth)) == pytest.approx(expected, abs=1e-4)
    assert float(metrics.psnr(truth, truth)) == 100.0


def test_psnr_of_half_precision_is_computed_in_full():
    prediction, truth = (image.bfloat16() for image in images())
    assert float(metrics.psnr(prediction, truth)) == float(metrics.psnr(prediction.float(), truth.float()))


def test_ssim_equals_a_plain_gaussian_window_computation():
    prediction, truth = (image.clamp(0, 1) for image in images())
    x = torch.arange(11) - 5.0
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = (window / window.sum()).double()
    kernel = (window[:, None] * window)[None, None]

    def blur(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(image.double().permute(2, 0, 1)[:, None], kernel)

    a, b = blur(prediction), blur(truth)
    sample = 121 / 120  # scikit-image's default: the sample covariance of the 11x11 window
    va, vb = ((blur(i.double().square()) - m.square()) * sample for i, m in ((prediction, a), (truth, b)))
    cab = (blur(prediction.double() * truth.double()) - a * b) * sample
    value = (2 * a * b + 1e-4) * (2 * cab + 9e-4) / ((a * a + b * b + 1e-4) * (va + vb + 9e-4))
    assert metrics.ssim(prediction, truth) == pytest.approx(float(value.mean()), abs=1e-5)


def test_ssim_says_that_an_image_is_too_small():
    assert metrics.ssim(*images(11, 11)) < 1
    with pytest.raises(ValueError, match="found an image of 10 x 24 pixels; expected at least 11 x 11"):
        metrics.ssim(*images(10, 24))


def plain_flip(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Mean LDR-FLIP from the paper (Andersson et al. 2020), sections 4 and 5, in float64."""
    pixels_per_degree = 0.7 * 3840 / 0.7 * np.pi / 180
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    white = to_xyz.sum(axis=1)
    # Contrast sensitivity of achromatic, red-green and blue-yellow: a1, b1, a2, b2 of two Gaussians each.
    sensitivity = ((1, 0.0047, 0, 1e-5), (1, 0.0053, 0, 1e-5), (34.1, 0.04, 13.5, 0.025))

    def offsets(radius: int) -> tuple[np.ndarray, np.ndarray]:
        return np.meshgrid(np.arange(-radius, radius + 1.0), np.arange(-radius, radius + 1.0))

    def linear(srgb: np.ndarray) -> np.ndarray:
        return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)

    def opponent(rgb: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(rgb @ to_xyz.T / white, -1, 0)
        return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)

    def from_opponent(image: np.ndarray) -> np.ndarray:
        y = (image[..., 0] + 16) / 116
        xyz = np.stack([y + image[..., 1] / 500, y, y - image[..., 2] / 200], axis=-1) * white
        return (xyz @ np.linalg.inv(to_xyz).T).clip(0, 1)

    def hunt_lab(rgb: np.ndarray) -> np.ndarray:
        t = rgb @ to_xyz.T / white
        x, y, z = np.moveaxis(np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
        lightness = 116 * y - 16
        return np.stack([lightness, 0.01 * lightness * 500 * (x - y), 0.01 * lightness * 200 * (y - z)], axis=-1)

    def hyab(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a[..., 0] - b[..., 0]) + np.hypot(a[..., 1] - b[..., 1], a[..., 2] - b[..., 2])

    def seen(image: np.ndarray) -> np.ndarray:
        x, y = offsets(math.ceil(3 * math.sqrt(0.04 / (2 * np.pi**2)) * pixels_per_degree))
        squared = (x**2 + y**2) / pixels_per_degree**2
        channels = []
        for channel, (a1, b1, a2, b2) in zip(np.moveaxis(opponent(image), -1, 0), sensitivity):
            kernel = sum(a * np.sqrt(np.pi / b) * np.exp(-(np.pi**2) * squared / b) for a, b in ((a1, b1), (a2, b2)))
            channels.append(ndimage.correlate(channel, kernel / kernel.sum(), mode="nearest"))
        return hunt_lab(from_opponent(np.stack(channels, axis=-1)))

    def features(image: np.ndarray) -> list[np.ndarray]:
        """How much of an edge and how much of a point each pixel is."""
        deviation = 0.5 * 0.082 * pixels_per_degree
        x, y = offsets(math.ceil(3 * deviation))
        gaussian = np.exp(-(x**2 + y**2) / (2 * deviation**2))
        luminance = (opponent(image)[..., 0] + 16) / 116
        strengths = []
        for kernel in (-x * gaussian, (x**2 / deviation**2 - 1) * gaussian):
            kernel = np.where(kernel > 0, kernel / kernel[kernel > 0].sum(), -kernel / kernel[kernel < 0].sum())
            along_x, along_y = (ndimage.correlate(luminance, k, mode="nearest") for k in (kernel, kernel.T))
            strengths.append(np.hypot(along_x, along_y))
        return strengths

    test, reference = linear(prediction), linear(truth)
    largest = hyab(*(hunt_lab(np.array(c, float)) for c in ((0, 1, 0), (0, 0, 1)))) ** 0.7
    colour = hyab(seen(reference), seen(test)) ** 0.7
    knee = 0.4 * largest
    colour = np.where(colour < knee, 0.95 * colour / knee, 0.95 + 0.05 * (colour - knee) / (largest - knee))
    edges_and_points = [np.abs(r - t) for r, t in zip(features(reference), features(test))]
    feature = np.sqrt(np.maximum(*edges_and_points) / np.sqrt(2))
    return float((colour ** (1 - feature)).mean())


@pytest.mark.parametrize("noise", [0.02, 0.3])
@pytest.mark.parametrize("blur", [0, 2])
def test_flip_equals_a_transcription_of_the_paper(noise, blur):
    prediction, truth = (image.clamp(0, 1).numpy() for image in images(41, 56, noise))
    truth, prediction = (ndimage.gaussian_filter(image, (blur, blur, 0)) for image in (truth, prediction))
    value = metrics.flip(torch.from_numpy(prediction), torch.from_numpy(truth))
    assert value == pytest.approx(plain_flip(prediction.astype(float), truth.astype(float)), abs=1e-4)
    assert value > 0.01


def test_flip_is_zero_for_equal_colours_after_clamping():
    truth = images()[1].round()
    assert metrics.flip(truth * 3 - 1, truth) == 0.0


def plain_lpips(prediction: torch.Tensor, truth: torch.Tensor, net: str, state: dict[str, torch.Tensor]) -> float:
    """LPIPS from its paper (Zhang et al. 2018): weighted squared distances of features of unit length, in float64."""
    with torch.device("meta"):
        features = ARCHITECTURES[net](weights=None).features
    features.load_state_dict({k[9:]: v.double() for k, v in state.items() if k.startswith("features")}, assign=True)
    package = Path(importlib.util.find_spec("lpips").origin).parent
    heads = [head.double()[0] for head in torch.load(package / f"weights/v0.1/{net}.pth", "cpu").values()]
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[:, :, None, None]
    a, b = ((image.double().permute(2, 0, 1) - mean) / deviation for image in (prediction, truth))
    distance = 0.0
    for i, layer in enumerate(features[: RELUS[net][-1] + 1]):
        a, b = layer(a), layer(b)
        if i in RELUS[net]:
            difference = a / a.norm(dim=0).clamp(min=1e-10) - b / b.norm(dim=0).clamp(min=1e-10)
            distance += (heads[RELUS[net].index(i)] * difference.square()).sum(dim=0).mean().item()
    return distance


@pytest.mark.parametrize("net", RELUS)
def test_lpips_equals_a_plain_computation(net, random_weights):
    prediction, truth = images(45, 52)
    expected = plain_lpips(prediction.clamp(0, 1), truth, net, random_weights[net])
    assert expected > 1e-3
    assert metrics.lpips(prediction, truth, net) == pytest.approx(expected, rel=1e-5)
    assert metrics.lpips(truth, truth, net) == 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert metrics.lpips(prediction, truth, net) == pytest.approx(expected, rel=1e-5)
    assert metrics._lpips_network.cache_info().misses == 1


def test_image_metrics_are_all_metrics(random_weights):
    prediction, truth = images(40, 40)
    assert metrics.image_metrics(prediction, truth) == {
        "psnr": float(metrics.psnr(prediction, truth)),
        "ssim": metrics.ssim(prediction, truth),
        "flip": metrics.flip(prediction, truth),
        "lpips_vgg": metrics.lpips(prediction, truth, "vgg"),
        "lpips_alex": metrics.lpips(prediction, truth, "alex"),
    }


def test_lpips_is_left_out_with_one_warning_where_weights_are_missing(torch_home):
    command = "`elvsm fetch lpips` gets the weights"
    both = "LPIPS is left out: vgg16-397923af.pth and alexnet-owt-7be5be79.pth missing in .*; " + command
    with pytest.warns(UserWarning, match=both) as caught:
        assert set(metrics.image_metrics(*images(40, 40))) == {"psnr", "ssim", "flip"}
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.image_metrics(*images(40, 40))


def test_each_image_goes_once_through_lpips_networks(random_weights, monkeypatch):
    truth, first, second = torch.rand(3, 40, 36, 3, generator=torch.Generator().manual_seed(1))
    alone = []
    for pair in ((first, truth), (second, truth), (truth, second)):
        metrics._lpips_network.cache_clear()
        alone.append(metrics.lpips(*pair))
    metrics._lpips_network.cache_clear()
    network, computed = metrics._lpips_network("vgg", torch.device("cpu")).net, []
    network.features.register_forward_hook(lambda *_: computed.append(1))
    assert [metrics.lpips(first, truth), metrics.lpips(second, truth), metrics.lpips(truth, second)] == alone
    assert len(computed) == 3 and len(network._last) == 3
    monkeypatch.setattr(metrics, "REMEMBERED_BYTES", 1)  # less than one image has: the last one stays
    assert metrics.lpips(first, truth) == alone[0] and len(computed) == 4 and len(network._last) == 1
    assert metrics.lpips(first, truth) == alone[0] and len(computed) == 6


def test_one_network_is_enough_for_its_metric(random_weights, torch_home):
    (torch_home / "hub/checkpoints" / metrics.LPIPS_WEIGHTS["vgg"]).unlink()
    with pytest.warns(UserWarning, match="LPIPS is left out: vgg16-397923af.pth missing in"):
        assert set(metrics.image_metrics(*images(40, 40))) == {"psnr", "ssim", "flip", "lpips_alex"}


def test_lpips_is_left_out_with_one_warning_for_small_images(random_weights):
    with pytest.warns(
        UserWarning, match="LPIPS is left out: found images of 16 x 40 pixels; it needs 32 x 32"
    ) as caught:
        assert set(metrics.image_metrics(*images(16, 40))) == {"psnr", "ssim", "flip"}
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.image_metrics(*images(16, 40))
        assert len(metrics.image_metrics(*images(32, 32))) == 5


def test_broken_weights_are_named(random_weights, torch_home):
    path = torch_home / "hub/checkpoints" / metrics.LPIPS_WEIGHTS["alex"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="alexnet-owt-7be5be79.pth cannot be read; `elvsm fetch lpips"):
        metrics.lpips(*images(40, 40), "alex")


def test_importing_the_metrics_is_light():
    code = (
        "import sys, elvsm_nerfstudio.evaluation.metrics\n"
        "print([name for name in ('flip_evaluator', 'lpips', 'skimage', 'torchvision') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
