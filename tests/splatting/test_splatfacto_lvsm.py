"""splatfacto on a few frames and on views between them that a network renders."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_cli, write_scene
from nerfstudio.engine.optimizers import AdamOptimizerConfig, Optimizers
from torch import nn

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.method_configs import efficient_lvsm_plus_tiny
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.weights import save_weights
from elvsm_nerfstudio.splatting import rendered_datamanager
from elvsm_nerfstudio.splatting.model import AREA, rendered_view_loss
from elvsm_nerfstudio.splatting.rendered_datamanager import RenderedViewsDataManager, RenderedViewsDataManagerConfig
from elvsm_nerfstudio.splatting.rendered_steps import RATES, RenderedSteps, falls_until, rates_for, trust
from elvsm_nerfstudio.splatting.rendered_views import LeftOut, leave_out, render_views
from elvsm_nerfstudio.splatting.rendering_weights import load_renderer
from elvsm_nerfstudio.splatting.schedules import FloatExponentialDecaySchedulerConfig, multiply_rates

NETWORK = EfficientLVSMConfig(
    width=32, num_layers=1, head_dim=16, patch_size=8, camera_encoding="prope", ray_frame="camera"
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return write_scene(tmp_path_factory.mktemp("spheres") / "scene", num_frames=12, size=(50, 60))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    save_weights(path, NETWORK.build().state_dict(), NETWORK)
    return path


def manager(scene: Path, weights: Path, **options) -> RenderedViewsDataManager:
    options = {
        "data": scene,
        "weights": str(weights),
        "image_size": (40, 44),
        "rendered_image_size": (16, 24),
        "context_frames": (1, 5, 8),
        "num_initial_points": 50,
        "initial_points": "random",
        "num_rendered_views": 5,
        **options,
    }
    return RenderedViewsDataManagerConfig(**options).setup(device="cpu", test_mode="val")


class Knowing(nn.Module):
    """A network that has seen the pictures it is asked for, and adds an error to them."""

    def __init__(self, views, error: float):
        super().__init__()
        self.views, self.error = views, error

    def forward(self, context, target):
        here = (self.views.camera_to_world[0][:, None] == target.camera_to_world[0]).all(-1).all(-1)
        return (self.views.rgb[:, here.float().argmax(dim=0)] + self.error).clamp(0, 1)


# Which steps


def test_the_share_falls_linearly_and_evenly():
    steps = RenderedSteps(first_share=0.6, end=400)
    taken = [step for step in range(500) if steps.before(step + 1) > steps.before(step)]
    assert len(taken) == steps.before(500) == steps.before(400) == 120  # half of 0.6 of 400
    assert sum(step < 200 for step in taken) == 90 and max(taken) < 400
    assert all(b - a <= 2 for a, b in zip(taken[:20], taken[1:20]))
    assert RenderedSteps(0.5).before(100) == 50  # and does not fall
    assert RenderedSteps(0.0).before(100) == 0


def test_trust_goes_by_left_out_photos():
    assert [trust(gain, 2) for gain in (-3.0, 0.0, 0.25, 5.0, None)] == [0.0, 0.5, 0.75, 1.0, 1.0]
    assert [trust(1.0, views) for views in (2, 4, 8)] == [1.0, 0.5, 0.0]  # more is asked for the more photos there are
    left_out = LeftOut(network=20.0, mean=15.0, nearest=18.0, colour=10.0)
    assert [left_out.gain(views) for views in (2, 4, 8)] == [
        10.0,
        6.0,
        4.0,
    ]  # copies count more from more views


def test_the_share_reaches_zero_the_sooner_the_more_photos_there_are():
    assert [falls_until(views) for views in (2, 8, 16)] == [4.0, 1.0, 0.5]


def test_photos_are_left_out_in_turn(scene, weights):
    context = manager(scene, weights).shown_scene().views.context
    known = leave_out(Knowing(context, 0.1), context)
    assert known.network > max(known.mean, known.nearest, known.colour)
    worse = leave_out(lambda context, target: torch.rand_like(target.rgb), context)
    assert worse.mean == known.mean and worse.gain(3) < 0
    photos = context.rgb[0]
    means = [(photos[(i + 1) % 3] + photos[(i + 2) % 3]) / 2 for i in range(3)]
    scores = [float(psnr(mean, photo)) for mean, photo in zip(means, photos)]
    assert known.mean == pytest.approx(sum(scores) / 3, abs=1e-4)
    colours = [mean.mean(dim=(0, 1)).expand_as(mean) for mean in means]
    scores = [float(psnr(colour, photo)) for colour, photo in zip(colours, photos)]
    assert known.colour == pytest.approx(sum(scores) / 3, abs=1e-4)
    assert leave_out(Knowing(context, 0.0), context.select([0])) is None


# What is compared


def test_only_the_means_of_areas_count():
    generator = torch.Generator().manual_seed(0)
    rendered = torch.rand(4 * AREA, 4 * AREA, 3, generator=generator)
    sure = torch.ones_like(rendered[..., :1])
    checks = torch.ones(4 * AREA, 4 * AREA, 1)
    checks[::2, ::2] = checks[1::2, 1::2] = -1
    assert rendered_view_loss(rendered + 0.2 * checks, rendered, sure) < 1e-6
    assert rendered_view_loss(rendered + 0.2, rendered, sure) == pytest.approx(0.2, abs=1e-5)
    half_sure = sure.clone()
    half_sure[: 2 * AREA] = 0
    assert rendered_view_loss(rendered + 0.2, rendered, half_sure) == pytest.approx(0.1, abs=1e-5)
    cropped, sure = rendered[:-1, :-3], sure[:-1, :-3]  # areas at the rim are smaller
    assert rendered_view_loss(cropped + 0.2, cropped, sure) == pytest.approx(0.2, abs=1e-5)


def test_pixels_on_which_parts_of_the_context_disagree_count_less(scene, weights):
    data = manager(scene, weights)
    context, cameras = data._context_at((16, 24), 8)
    network = load_renderer(str(weights), "cpu").network
    network.autocast_dtype = None
    views = render_views(network, context, cameras[:2])
    assert views.images.shape == (2, 16, 24, 3) and views.confidence.shape == (2, 16, 24, 1)
    expected = network(context, context.select([0, 1]))[0]
    assert torch.allclose(views.images, expected, atol=1e-5)
    parts = [network(context.select(kept), context.select([0, 1]))[0] for kept in ([1, 2], [0, 2], [0, 1])]
    doubt = torch.stack(parts).std(dim=0).mean(dim=-1, keepdim=True) * 2 / 3**0.5
    assert torch.allclose(views.confidence, 1 / (1 + (doubt / 0.075) ** 2), atol=1e-4)
    assert (render_views(network, context.select([0]), cameras[:1]).confidence == 1).all()

    # Finer renders than the photos are reduced to their pixels, what they see stays; coarser ones are left.
    height, width = views.images.shape[1:3]
    reduced = views.in_at_most((height // 2, width // 2))
    assert reduced.images.shape[1:3] == (height // 2, width // 2) and reduced.confidence.shape[1:] == (
        height // 2, width // 2, 1,
    )  # fmt: skip
    torch.testing.assert_close(reduced.images[0, 0, 0], views.images[0, :2, :2].mean(dim=(0, 1)))
    torch.testing.assert_close(reduced.cameras.fx * 2, views.cameras.fx)
    assert views.in_at_most((2 * height, width)) is views


# The data manager


def test_rendered_views_stand_beside_the_photos(scene, weights):
    data = manager(scene, weights, rendered_share=0.5)
    data.plan(40)
    batches = [data.next_train(step) for step in range(40)]
    rendered = [batch for _, batch in batches if "confidence" in batch]
    photos = [batch for _, batch in batches if "confidence" not in batch]
    assert len(rendered) == data.record()["rendered_views"]["steps"] == 16  # 0.5, falling to 0 at 8 / 3 of 40
    assert data.record()["rendered_views"]["share_of_steps"] == 0.4
    assert sorted(batch["image_idx"] for batch in photos[:3]) == [0, 1, 2]
    assert all(batch["image"].shape == (40, 44, 3) for batch in photos)
    for number, batch in enumerate(rendered):
        assert torch.equal(batch["image"], data.rendered.images[number % 5]) and batch["image"].shape == (16, 24, 3)
    camera = next(camera for camera, batch in batches if "confidence" in batch)
    assert (int(camera.height), int(camera.width)) == (16, 24)
    assert not (camera.camera_to_worlds == data.context_cameras.camera_to_worlds).all(-1).all(-1).any()


def test_weights_that_do_not_know_a_scene_are_not_used_and_this_is_said(scene, weights, capsys, monkeypatch):
    data = manager(scene, weights)
    said = " ".join(capsys.readouterr().out.split())
    assert "does not know scenes like scene: its renders are not used" in said
    data.plan(100)
    record = data.record()["rendered_views"]
    assert data.rates() == record["rates"] == {}
    assert record["steps"] == 0 and record["trust"] == 0 and record["left_out_psnr"]["network"] < 15
    assert all("confidence" not in data.next_train(step)[1] for step in range(100))

    monkeypatch.setattr(rendered_datamanager, "leave_out", lambda *_: LeftOut(20.0, 15.0, 14.0, 10.0))
    data = manager(scene, weights)
    assert "does not know" not in " ".join(capsys.readouterr().out.split())
    data.plan(100)
    assert data.record()["rendered_views"]["steps"] == 48  # 0.6, falling to 0 at 8 / 3 of 100
    assert data.rates() == data.record()["rendered_views"]["rates"] == RATES
    data.plan(30_000)
    assert data.rates() == dict.fromkeys(RATES, 1.0)


def test_a_fit_starts_as_without_a_network(scene, weights):
    """Random numbers that come after are those of splatfacto-sparse, which loads no network: its random weights draw
    none of them."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    manager(scene, weights)
    assert torch.equal(torch.rand(4), expected)


def test_names_of_weights(weights, tmp_path):
    assert load_renderer("pretrained", "cpu").image_size == (128, 128)
    found = load_renderer(str(weights), "cpu")
    assert (found.file, found.image_size) == (weights, None) and found.network.config == NETWORK

    run = tmp_path / "run"
    (run / "nerfstudio_models").mkdir(parents=True)
    config = deepcopy(efficient_lvsm_plus_tiny.config)
    config.pipeline.model.network = NETWORK
    config.pipeline.datamanager.image_size = (24, 32)
    (run / "config.yml").write_text(yaml.dump(config))
    state = {f"_model.network.{name}": x for name, x in NETWORK.build().state_dict().items()}
    checkpoint = run / "nerfstudio_models" / "step-000000007.ckpt"
    torch.save({"step": 7, "pipeline": state}, checkpoint)
    for name in (run, run / "config.yml", checkpoint):
        found = load_renderer(str(name), "cpu")
        assert (found.file, found.image_size) == (checkpoint, (24, 32)) and found.network.config == NETWORK
    checkpoint.unlink()
    with pytest.raises(ValueError, match="--pipeline.datamanager.weights .*nerfstudio_models holds no checkpoint"):
        load_renderer(str(run), "cpu")
    with pytest.raises(ValueError, match="--pipeline.datamanager.weights .*nowhere.* does not exist"):
        load_renderer(str(tmp_path / "nowhere.safetensors"), "cpu")


def test_bad_options(scene, weights):
    with pytest.raises(DataError, match="rendered-share 1.5: expected a number above 0 and up to 1"):
        manager(scene, weights, rendered_share=1.5)
    with pytest.raises(DataError, match="num-rendered-views 0: expected at least 1"):
        manager(scene, weights, num_rendered_views=0)
    with pytest.raises(DataError, match="found 20 24; expected multiples of 8, the patches of"):
        manager(scene, weights, rendered_image_size=(20, 24))


def test_rates_are_the_more_splatfacto_s_the_longer_a_training_is():
    assert rates_for(30) == rates_for(500) == RATES
    middle = rates_for(round((500 * 30_000) ** 0.5))
    assert middle == pytest.approx({name: rate**0.5 for name, rate in RATES.items()}, rel=1e-3)
    assert rates_for(30_000) == rates_for(100_000) == dict.fromkeys(RATES, 1.0)


def test_rates_are_multiplied_once_and_schedules_with_them():
    def optimizers(rate: float, last: float) -> Optimizers:
        schedule = FloatExponentialDecaySchedulerConfig(lr_final=last, max_steps=40)
        config = {
            "means": {"optimizer": AdamOptimizerConfig(lr=rate), "scheduler": schedule},
            "scales": {"optimizer": AdamOptimizerConfig(lr=0.005), "scheduler": None},
        }
        return Optimizers(config, {name: [nn.Parameter(torch.ones(2))] for name in config})

    def rates(of: Optimizers, steps: int) -> list[float]:
        found = []
        for step in range(steps):
            found += [float(optimizer.param_groups[0]["lr"]) for optimizer in of.optimizers.values()]
            of.optimizer_step_all()
            of.scheduler_step_all(step)
        return found

    faster, factors = optimizers(1e-4, 1e-6), {"means": 10.0, "scales": 2.0}
    multiply_rates(faster, factors)
    expected = rates(optimizers(1e-3, 1e-5), 30)
    expected[1::2] = [0.01] * 30
    assert rates(faster, 12) == pytest.approx(expected[:24])
    resumed = optimizers(1e-4, 1e-6)
    for name in factors:
        resumed.optimizers[name].load_state_dict(faster.optimizers[name].state_dict())
    resumed.load_schedulers({"means": faster.schedulers["means"].state_dict()})
    multiply_rates(resumed, factors)
    assert rates(resumed, 18) == pytest.approx(expected[24:])


# nerfstudio's programs


def test_from_training_to_a_splat(scene, weights, tmp_path):
    run_cli(
        "ns-train", "splatfacto-lvsm", "--data", str(scene), "--machine.device-type", "cpu", "--vis", "tensorboard",
        "--max-num-iterations", "30", "--output-dir", "outputs", "--experiment-name", "spheres", "--timestamp", "run",
        "--pipeline.datamanager.image-size", "40", "44", "--pipeline.datamanager.num-initial-points", "60",
        "--pipeline.datamanager.initial-points", "random", "--pipeline.datamanager.weights", str(weights),
        "--pipeline.datamanager.rendered-image-size", "16", "24", "--pipeline.datamanager.rendered-share", "0.5",
        "--pipeline.datamanager.num-rendered-views", "4", cwd=tmp_path,
    )  # fmt: skip
    run = tmp_path / "outputs" / "spheres" / "splatfacto-lvsm" / "run"
    fit = json.loads((run / "fit.json").read_text())
    rendered = fit["rendered_views"]
    assert rendered["weights"] == str(weights) and rendered["views"] == 4 and rendered["image_size"] == [16, 24]
    assert rendered["network"].startswith("EfficientLVSM") and len(rendered["fingerprint"]) == 32
    assert rendered["steps"] == 11 and rendered["share_of_steps"] == rendered["steps"] / 30
    assert rendered["rates"] == RATES
    config = yaml.load((run / "config.yml").read_text(), yaml.Loader)
    checkpoint = torch.load(run / "nerfstudio_models" / "step-000000029.ckpt", weights_only=False)
    for name, optimizer in checkpoint["optimizers"].items():
        rate = config.optimizers[name]["optimizer"].lr * RATES.get(name, 1.0)
        assert optimizer["param_groups"][0].get("initial_lr", rate) == pytest.approx(rate), name
    assert fit["seconds"]["rendered_views"] > 0 and fit["initial_points"]["kind"] == "random"

    weights.rename(weights.with_suffix(".away"))  # a trained run needs the network no more
    try:
        run_cli("ns-eval", "--load-config", str(run / "config.yml"), "--output-path", "result.json", cwd=tmp_path)
        run_cli("ns-export", "gaussian-splat", "--load-config", str(run / "config.yml"), "--output-dir", "splat",
                cwd=tmp_path)  # fmt: skip
    finally:
        weights.with_suffix(".away").rename(weights)
    record = json.loads((tmp_path / "result.json").read_text())["results"]["record"]
    assert record["rendering"]["rendered_views"] == rendered
    assert (tmp_path / "splat" / "splat.ply").stat().st_size > 60 * 4 * 14
