"""The perceptual losses against plain ones, on random weights in the files' true formats, and in nerfstudio's hands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import TINY_NETWORK, run_cli, tiny_pipeline
from torch import Tensor, nn

from elvsm_nerfstudio.training.perceptual import PerceptualLossConfig
from elvsm_nerfstudio.training.vgg_files import FILES, read_vgg

DEPTHS = {"vgg19": (2, 2, 4, 4, 4), "vgg16": (2, 2, 3, 3, 3)}
WIDTHS = (64, 128, 256, 512, 512)
SLICES = {
    "vgg19": ((0, 4), (4, 9), (9, 14), (14, 23), (23, 32)),
    "vgg16": ((0, 4), (4, 9), (9, 14), (14, 21), (21, 28)),
}


def convolutions(net: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random kernels [height, width, in, out] and biases by name, of a size that keeps features alive to the end."""
    generator = np.random.default_rng(seed)
    found, channels = {}, 3
    for stage, (depth, width) in enumerate(zip(DEPTHS[net], WIDTHS), 1):
        for i in range(1, depth + 1):
            kernel = generator.standard_normal((3, 3, channels, width), np.float32) * (2 / (9 * channels)) ** 0.5
            found[f"conv{stage}_{i}"] = kernel, generator.standard_normal(width, np.float32) * 0.1
            channels = width
    return found


def cell(*items) -> np.ndarray:
    row = np.empty((1, len(items)), dtype=object)
    row[0, :] = items
    return row


def write_mat(path: Path, named: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """As MatConvNet's file: a row of structures, fully connected layers included."""
    layers = []
    for name, (kernel, bias) in named.items():
        if name.endswith("_1") and layers:
            layers.append({"name": f"pool{name[4]}", "type": "pool", "method": "max", "pool": [2, 2], "stride": [2, 2]})
        layers.append({"name": name, "type": "conv", "weights": cell(kernel, bias[None]), "pad": 1, "stride": 1})
        layers.append({"name": name.replace("conv", "relu"), "type": "relu"})
    fully_connected = np.zeros((7, 7, 4, 3), np.float32), np.zeros((1, 3), np.float32)
    layers += [{"name": "fc6", "type": "conv", "weights": cell(*fully_connected)}, {"name": "prob", "type": "softmax"}]
    scipy.io.savemat(path, {"layers": cell(*layers), "meta": {"classes": {"name": cell("a", "b")}}})
    return path


def sequential(net: str, named: dict[str, tuple[np.ndarray, np.ndarray]], pooling: type[nn.Module]) -> nn.Sequential:
    """The ``features`` of torchvision's network."""
    layers: list[nn.Module] = []
    for name, (kernel, bias) in named.items():
        if name.endswith("_1") and layers:
            layers.append(pooling(2))
        convolution = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, padding=1)
        convolution.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        convolution.bias.data = torch.from_numpy(bias)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers).requires_grad_(False)


def write_pth(path: Path, named: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """As torchvision's file; the classifier's zeros share one stored element."""
    state = {f"features.{name}": value for name, value in sequential("vgg16", named, nn.MaxPool2d).state_dict().items()}
    for layer, shape in ((0, (4096, 25088)), (3, (4096, 4096)), (6, (1000, 4096))):
        state[f"classifier.{layer}.weight"] = torch.zeros(()).expand(shape)
        state[f"classifier.{layer}.bias"] = torch.zeros(()).expand(shape[0])
    torch.save(state, path)
    return path


WRITE = {"vgg19": write_mat, "vgg16": write_pth}


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory) -> Path:
    """A TORCH_HOME with both files."""
    home = tmp_path_factory.mktemp("home")
    (home / "hub/checkpoints").mkdir(parents=True)
    for seed, (net, write) in enumerate(WRITE.items()):
        write(home / "hub/checkpoints" / FILES[net].name, convolutions(net, seed))
    return home


@pytest.fixture
def weights(torch_home, monkeypatch) -> Path:
    """The folder of the two files, where they are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return torch_home / "hub/checkpoints"


def images(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(*shape, 3, generator=generator)
    return (truth + 0.2 * torch.randn(truth.shape, generator=generator)).clamp(0, 1).requires_grad_(), truth


def plain(net: str, seed: int, prediction: Tensor, truth: Tensor) -> Tensor:
    """The loss as its description reads, slice by slice of torchvision's ``features``."""
    features = sequential(net, convolutions(net, seed), nn.AvgPool2d)
    x, y = (image.flatten(0, -4).permute(0, 3, 1, 2) for image in (prediction, truth))
    if net == "vgg19":
        mean, std = torch.tensor([123.68, 116.779, 103.939]), torch.ones(3)
        x, y, last = x * 255, y * 255, 255
        weights = (1, 1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
    else:
        mean, std, last = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]), 1
        weights = (1, 1 / 8.5, 1 / 15.5, 1 / 18, 1 / 6.6, 1 / 2.9)
    terms = [weights[0] * torch.nn.functional.l1_loss(x, y)]
    x, y = ((image - mean[:, None, None]) / std[:, None, None] for image in (x, y))
    for weight, (start, stop) in zip(weights[1:], SLICES[net]):
        x, y = features[start:stop](x), features[start:stop](y)
        terms.append(weight * torch.nn.functional.l1_loss(x, y))
    total = sum(terms)
    assert min(terms) > 0.005 * total  # so that a wrong term shows
    return total / last


def gradient(loss: Tensor, image: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, image)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed, net", enumerate(DEPTHS))
def test_loss_and_gradient_are_those_of_a_plain_one(weights, seed, net):
    loss = PerceptualLossConfig(net).build()
    prediction, truth = images(2, 2, 32, 48)
    found, expected = loss(prediction, truth), plain(net, seed, prediction, truth)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradient(found, prediction), gradient(expected, prediction)) < 1e-3
    assert loss(truth, truth) == 0


def test_lpips_is_that_of_the_package(weights):
    from lpips import LPIPS

    loss = PerceptualLossConfig("lpips").build()
    prediction, truth = images(3, 1, 32, 40)
    package = LPIPS(net="vgg", verbose=False)  # takes the file under TORCH_HOME itself
    x, y = (image.flatten(0, 1).permute(0, 3, 1, 2) for image in (prediction, truth))
    found, expected = loss(prediction, truth), package(x, y, normalize=True).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found > 1e-3
    assert relative_error(gradient(found, prediction), gradient(expected, prediction)) < 1e-3


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16", "lpips"])
def test_nothing_frozen_gets_a_gradient_and_neither_does_the_truth(weights, backbone):
    loss = PerceptualLossConfig(backbone).build()
    prediction, truth = images(1, 1, 16, 16)
    truth.requires_grad_()
    loss(prediction, truth).backward()
    assert prediction.grad.abs().sum() > 0 and truth.grad is None
    assert not isinstance(loss, nn.Module)
    tensors = (
        list(loss._network.parameters()) if backbone == "lpips" else [t for s in loss._stages for p in s for t in p]
    )
    assert len(tensors) >= 20 and not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("backbone", ["vgg16", "lpips"])
def test_bf16_is_close_and_can_be_left_again(weights, backbone):
    loss = PerceptualLossConfig(backbone).build()
    prediction, truth = images(2, 1, 32, 32)
    exact = loss(prediction, truth)
    loss.to(torch.device("cpu"), torch.bfloat16)
    with torch.autocast("cpu", torch.float16):  # the caller's precision is not ours
        close = loss(prediction, truth)
    assert close.dtype == torch.float32 and close != exact and close.item() == pytest.approx(exact.item(), rel=0.01)
    loss.to(torch.device("cpu"), torch.float32)
    assert loss(prediction, truth) == exact


@pytest.mark.parametrize(
    "shapes", [((1, 15, 16, 3), (1, 15, 16, 3)), ((1, 16, 16, 3), (1, 16, 24, 3)), ((16, 16, 3),) * 2]
)
def test_images_that_do_not_fit_are_refused(weights, shapes):
    loss = PerceptualLossConfig("vgg16").build()
    with pytest.raises(ValueError, match=r"found images of shapes .* at least 16 pixels a side"):
        loss(*(torch.rand(shape) for shape in shapes))


# Files


def test_none_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert PerceptualLossConfig().build() is None


@pytest.mark.parametrize(
    "backbone, command",
    [
        ("vgg19", r"elvsm fetch vgg19\n"),
        ("vgg16", r"elvsm fetch lpips\n"),
        ("lpips", r"elvsm fetch lpips\n"),
    ],
)  # fmt: skip
def test_missing_weights_are_said_with_the_command_that_gets_them(tmp_path, monkeypatch, backbone, command):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match=command):
        PerceptualLossConfig(backbone).build()
    with pytest.raises(FileNotFoundError, match="there is no file elsewhere.bin"):
        PerceptualLossConfig(backbone, weights_file=Path("elsewhere.bin")).build()


def test_vgg16_is_where_the_script_puts_it():
    from elvsm_nerfstudio.evaluation.metrics import FETCH, LPIPS_WEIGHTS

    assert FILES["vgg16"].name == LPIPS_WEIGHTS["vgg"] and FILES["vgg16"].fetch == FETCH


@pytest.mark.parametrize("net", DEPTHS)
def test_every_convolution_is_read_from_a_named_file(tmp_path, net):
    named = convolutions(net, 5)
    stages = read_vgg(net, WRITE[net](tmp_path / "renamed", named))
    pairs = [pair for stage in stages for pair in stage]
    assert [len(stage) for stage in stages] == list(DEPTHS[net])
    for (weight, bias), (kernel, expected) in zip(pairs, named.values(), strict=True):
        assert np.array_equal(weight.permute(2, 3, 1, 0), kernel) and np.array_equal(bias, expected)


@pytest.mark.parametrize("net", DEPTHS)
def test_broken_and_foreign_files_are_refused(weights, tmp_path, net):
    whole = (weights / FILES[net].name).read_bytes()
    broken = tmp_path / "broken"
    for content in (whole[: len(whole) // 2], b"<html>404</html>", b""):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=rf"broken cannot be read as the weights of {net} [\s\S]*elvsm fetch "):
            read_vgg(net, broken)
    other = convolutions(net, 0)
    other["conv2_1"] = other["conv2_2"]
    with pytest.raises(ValueError, match=r"conv2_1: found shapes \[128, 128, 3, 3\].* expected \[128, 64, 3, 3\]"):
        read_vgg(net, WRITE[net](broken, other))
    del other["conv5_1"]
    with pytest.raises(ValueError, match="cannot be read"):
        read_vgg(net, WRITE[net](broken, other))


# In training


def with_loss(collection: Path, monkeypatch, backbone: str, test_mode: str = "val", **options):
    from elvsm_nerfstudio import method_configs

    spec = method_configs.efficient_lvsm_tiny
    model = replace(spec.config.pipeline.model, perceptual=PerceptualLossConfig(backbone, **options))
    config = replace(spec.config, pipeline=replace(spec.config.pipeline, model=model))
    monkeypatch.setattr(method_configs, "efficient_lvsm_tiny", replace(spec, config=config))
    return tiny_pipeline(collection, test_mode=test_mode)


def test_losses_go_by_name_and_are_weighted(weights, collection, monkeypatch):
    pipeline = with_loss(collection, monkeypatch, "vgg16", weight=0.25).train()
    outputs, losses, _ = pipeline.get_train_loss_dict(0)
    assert list(losses) == ["mse", "perceptual"]
    _, batch = pipeline.datamanager.next_train(0)  # the same step's: batches depend on nothing else
    expected = PerceptualLossConfig("vgg16").build()(outputs["rgb"], batch["image"])
    assert losses["perceptual"].item() == pytest.approx(0.25 * expected.item(), rel=1e-5)
    mse = (outputs["rgb"] - batch["image"]).square().mean()
    assert losses["mse"].item() == pytest.approx(mse.item(), rel=1e-5)
    parameters = list(pipeline.model.network.parameters())
    by_name = {name: torch.autograd.grad(loss, parameters, retain_graph=True) for name, loss in losses.items()}
    sum(losses.values()).backward()
    for parameter, *parts in zip(parameters, *by_name.values()):
        assert torch.allclose(parameter.grad, sum(parts), atol=1e-7)
    assert any(part.abs().sum() > 0 for part in by_name["perceptual"])


def test_it_can_look_at_the_first_target_views_alone(weights, collection, monkeypatch):
    """Those of every scene: the loss is theirs, and so is the gradient, wholly."""
    pipeline = with_loss(collection, monkeypatch, "vgg16", weight=0.5, target_views=1).train()
    outputs, losses, _ = pipeline.get_train_loss_dict(0)
    _, batch = pipeline.datamanager.next_train(0)
    scenes, targets = outputs["rgb"].shape[:2]
    assert scenes > 1 and targets > 1
    expected = PerceptualLossConfig("vgg16").build()(outputs["rgb"][:, :1], batch["image"][:, :1])
    assert losses["perceptual"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    (reached,) = torch.autograd.grad(losses["perceptual"], outputs["rgb"])
    assert (reached[:, :1].flatten(2).abs().sum(-1) > 0).all() and (reached[:, 1:] == 0).all()


def test_no_target_view_is_too_few(weights):
    with pytest.raises(ValueError, match=r"perceptual.target-views: found 0; expected at least 1, or None"):
        PerceptualLossConfig("vgg16", target_views=0).build()


def test_the_frozen_network_is_no_part_of_the_model(weights, collection, monkeypatch):
    without = tiny_pipeline(collection, test_mode="val")
    pipeline = with_loss(collection, monkeypatch, "vgg19")
    assert pipeline.model.perceptual_loss is not None
    assert list(pipeline.state_dict()) == list(without.state_dict())
    assert len(list(pipeline.parameters())) == len(list(without.parameters()))
    without.load_state_dict(pipeline.state_dict())


def test_training_stops_at_its_start_where_weights_are_missing_and_rendering_does_not(
    tmp_path, collection, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    options = dict(method="efficient_lvsm", view_sampler="random")
    with pytest.raises(FileNotFoundError, match="elvsm fetch vgg19"):
        tiny_pipeline(collection, test_mode="val", **options)
    pipeline = tiny_pipeline(collection, test_mode="test", **options)
    assert pipeline.get_average_eval_image_metrics()["num_scenes"] == 2
    tiny_pipeline(collection, test_mode="inference", **options)


def test_methods_take_the_paper_s_loss_and_those_for_a_cpu_none():
    from elvsm_nerfstudio.runs import network_methods

    assert len(network_methods()) == 10
    for name, config in network_methods().items():
        expected = PerceptualLossConfig("none" if name.endswith("tiny") else "vgg19", weight=0.5)
        assert config.pipeline.model.perceptual == expected, name


def test_nerfstudio_logs_the_loss_by_name(weights, tmp_path, collection):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_cli(
        "ns-train", "efficient-lvsm-tiny", *TINY_NETWORK, "--data", str(collection), "--machine.device-type", "cpu",
        "--vis", "tensorboard", "--max-num-iterations", "2", "--experiment-name", "e", "--timestamp", "run",
        "--pipeline.model.perceptual.backbone", "vgg16", "--logging.steps-per-log", "1", cwd=tmp_path,
    )  # fmt: skip
    run = tmp_path / "outputs/e/efficient-lvsm-tiny/run"
    events = EventAccumulator(str(run))
    events.Reload()
    parts = [events.Scalars(f"Train Loss Dict/{name}")[0].value for name in ("mse", "perceptual")]
    assert min(parts) > 0 and events.Scalars("Train Loss")[0].value == pytest.approx(sum(parts), rel=1e-4)
    saved = torch.load(run / "nerfstudio_models/step-000000001.ckpt", weights_only=True)
    assert saved["pipeline"] and not any("vgg" in name or "perceptual" in name for name in saved["pipeline"])
