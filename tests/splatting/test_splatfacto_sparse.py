"""splatfacto on a few frames without CUDA: as a method of nerfstudio, from training to renders."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, run_cli, write_collection, write_scene
from PIL import Image

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.view_samplers import FrameChoice
from elvsm_nerfstudio.method_configs.splatfacto_sparse import splatfacto_sparse
from elvsm_nerfstudio.splatting.datamanager import ContextFramesDataManagerConfig
from elvsm_nerfstudio.splatting.model import SparseSplatfactoModel, SparseSplatfactoModelConfig

SIZE = ("40", "44")


def train(cwd: Path, data: Path, name: str, steps: int, *options: str) -> Path:
    run_cli(
        "ns-train", "splatfacto-sparse", "--data", str(data), "--machine.device-type", "cpu", "--vis", "tensorboard",
        "--max-num-iterations", str(steps), "--output-dir", "outputs", "--experiment-name", name, "--timestamp", "run",
        "--pipeline.datamanager.image-size", *SIZE, "--pipeline.datamanager.num-initial-points", "300",
        *options, cwd=cwd,
    )  # fmt: skip
    return cwd / "outputs" / name / "splatfacto-sparse" / "run"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("splatting")


@pytest.fixture(scope="module")
def data(workspace) -> Path:
    return write_collection(workspace / "data", "train val test", size=(50, 60))


@pytest.fixture(scope="module")
def run(workspace, data) -> Path:
    index = workspace / "split.json"
    index.write_text(json.dumps({"scene_2": {"context": [0, 2, 4, 5, 7], "target": [1, 3]}}))
    return train(
        workspace, data, "object", 160, "--pipeline.datamanager.scene", "scene_2",
        "--pipeline.datamanager.evaluation-index", str(index),
        # Densification and pruning take part: these come after 500 steps by default.
        "--pipeline.model.warmup-length", "40", "--pipeline.model.refine-every", "40",
        "--pipeline.model.stop-split-at", "130",
    )  # fmt: skip


def test_a_training_says_how_it_fitted(run):
    fit = json.loads((run / "fit.json").read_text())
    assert fit["backend"] == "cpu" and fit["device"] == "cpu" and fit["iterations"] == 160
    assert fit["scene"] == "scene_2" and fit["context"] == ["000", "002", "004", "005", "007"]
    points = fit["initial_points"]
    assert points["kind"] == "plane-sweep" and points["points"] >= 200
    assert fit["gaussians"] != points["points"], "nothing was split, duplicated or pruned"
    assert 0 < fit["seconds"]["optimisation"] and 0 < fit["seconds"]["initial_points"]


def test_checkpoints_are_plain(run):
    state = torch.load(run / "nerfstudio_models" / "step-000000159.ckpt", weights_only=True)
    assert type(state["optimizers"]["means"]["param_groups"][0]["lr"]) is float
    assert state["optimizers"]["means"]["param_groups"][0]["lr"] == pytest.approx(1.6e-4 * 0.01 ** (160 / 30000))
    assert not any("lpips" in name for name in state["pipeline"])


def test_evaluation_and_renders(workspace, run):
    run_cli(
        "ns-eval", "--load-config", str(run / "config.yml"), "--output-path", "result.json",
        "--render-output-path", "pictures", cwd=workspace,
    )  # fmt: skip
    results = json.loads((workspace / "result.json").read_text())["results"]
    record, details = results["record"], json.loads((workspace / "result.images.json").read_text())
    assert record["rendering"]["backend"] == "cpu" and details["record"] == record
    assert record["rendering"]["context"] == details["context"]["scene_2"] == ["000", "002", "004", "005", "007"]
    rows = details["images"]
    assert [row["image"] for row in rows] == ["001", "003"] and results["num_images"] == 2
    assert results["psnr"] == pytest.approx((rows[0]["psnr"] + rows[1]["psnr"]) / 2)
    assert details["timing"]["by_context_views"].keys() == {"5"} and (workspace / "pictures" / "scene_2.png").exists()
    prediction = np.asarray(Image.open(workspace / "pictures" / "predictions" / "scene_2" / "001.png")) / 255
    assert prediction.shape == (40, 44, 3)

    from elvsm_nerfstudio.data.images import ImageSpec, read_image

    truth = read_image(workspace / "data" / "scene_2" / "images" / "001.png", (50, 60), ImageSpec((40, 44))) / 255
    psnr = -10 * math.log10(np.square(prediction - truth).mean())
    assert rows[0]["psnr"] == pytest.approx(psnr, abs=0.05)
    contexts = [
        read_image(workspace / "data" / "scene_2" / "images" / f"{i:03d}.png", (50, 60), ImageSpec((40, 44))) / 255
        for i in (0, 2, 4, 5, 7)
    ]
    mean = -10 * math.log10(np.square(np.mean(contexts, axis=0) - truth).mean())
    assert rows[0]["psnr_mean_of_context"] == pytest.approx(mean, abs=1e-3)
    copies = [-10 * math.log10(np.square(context - truth).mean()) for context in contexts]
    assert min(abs(rows[0]["psnr_copy_nearest"] - copy) for copy in copies) < 1e-3

    run_cli(
        "ns-render", "dataset", "--load-config", str(run / "config.yml"), "--output-path", "renders", "--split", "test",
        "--image-format", "png", "--rendered-output-names", "rgb", "depth", "accumulation", cwd=workspace,
    )  # fmt: skip
    rendered = np.asarray(Image.open(workspace / "renders" / "test" / "rgb" / "001.png")) / 255
    assert np.abs(rendered - prediction).max() < 0.01


def of_protocol(data: Path, protocol: str, scene: str = "scene_2"):
    config = deepcopy(splatfacto_sparse.config.pipeline)
    config.protocol, config.model.backend = protocol, "cpu"
    config.datamanager = replace(
        config.datamanager, data=data, scene=scene, image_size=(24, 28), initial_points="random", num_initial_points=50
    )
    return config.setup(device="cpu", test_mode="val", world_size=1, local_rank=0)


def test_a_protocols_frames_and_images_are_fitted_and_scored(data, tmp_path):
    pipeline = of_protocol(data, "objects-4view-black")
    assert pipeline.datamanager.shown_frames == FrameChoice((0, 1, 2, 3), (4, 5, 6, 7))
    assert pipeline.datamanager.context_images[:, 0, 0].max() < 0.5, "the background is not black"
    found = pipeline.get_average_eval_image_metrics(output_path=tmp_path)
    details = json.loads((tmp_path / "metrics.images.json").read_text())
    assert details["record"]["protocol"]["name"] == "objects-4view-black" and found["num_images"] == 4
    assert {row["context_views"] for row in details["images"]} == {4} and found["psnr_copy_nearest"] > 0
    assert details["record"]["rendering"]["gaussians"] == 50


def test_a_protocol_of_several_numbers_of_views_is_refused(data):
    with pytest.raises(ValueError, match="wide-range: Gaussians are fitted to one number .* 2, 4, 8, 12; expected one"):
        of_protocol(data, "wide-range")


def test_gaussians_of_other_frames_are_refused(workspace, run, monkeypatch):
    from nerfstudio.utils.eval_utils import eval_setup

    monkeypatch.chdir(workspace)

    def other_frames(config):
        config.pipeline.datamanager.context_frames = (0, 1, 2)
        return config

    with pytest.raises(ValueError, match="choose the frames 000, 001, 002 .* expected 000, 002, 004, 005, 007"):
        eval_setup(run / "config.yml", update_config_callback=other_frames)


def test_the_context_is_fitted(workspace, run, monkeypatch):
    from nerfstudio.utils.eval_utils import eval_setup

    monkeypatch.chdir(workspace)
    _, pipeline, _, _ = eval_setup(run / "config.yml")
    for index, image in enumerate(pipeline.datamanager.context_images):
        camera = pipeline.datamanager.context_cameras[index : index + 1]
        rgb = pipeline.model.get_outputs_for_camera(camera)["rgb"]
        assert (rgb - image).square().mean() < 0.2 * (1 - image).square().mean()


def test_training_resumes(workspace, data, run):
    resumed = train(
        workspace, data, "resumed", 3, "--pipeline.datamanager.scene", "scene_2",
        "--pipeline.datamanager.evaluation-index", str(workspace / "split.json"),
        "--load-dir", str(run / "nerfstudio_models"),
    )  # fmt: skip
    before, after = (
        torch.load(folder / "nerfstudio_models" / f"step-{step:09d}.ckpt", weights_only=True)
        for folder, step in ((run, 159), (resumed, 162))
    )
    for name in ("means", "features_dc", "opacities"):
        moved = after["pipeline"][f"_model.gauss_params.{name}"] - before["pipeline"][f"_model.gauss_params.{name}"]
        assert 0 < moved.abs().max() < 0.5, name
        assert after["optimizers"][name]["state"][0]["exp_avg"].shape == moved.shape


def model(backend: str = "cpu", **options) -> SparseSplatfactoModel:
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    config = SparseSplatfactoModelConfig(backend=backend, **options)
    return config.setup(
        scene_box=None, num_train_data=2, metadata={}, device="cpu", seed_points=(points, torch.full((50, 3), 255.0))
    )


def test_other_methods_are_left_alone():
    import nerfstudio.models.splatfacto as stock
    import torchmetrics.image.lpip as lpip
    from gsplat.rendering import rasterization

    metric = lpip.LearnedPerceptualImagePatchSimilarity
    ours = model()
    assert stock.rasterization is rasterization and rasterization.__module__ == "gsplat.rendering"
    assert lpip.LearnedPerceptualImagePatchSimilarity is metric and ours.lpips is None
    assert (ours.colors == 1).all() and ours.means.shape == (50, 3)


def test_gsplat_needs_a_gpu():
    with pytest.raises(RuntimeError, match="--pipeline.model.backend gsplat: found device cpu"):
        model("gsplat")


def test_the_viewers_crop_box_and_sizes(tmp_path):
    from nerfstudio.cameras.cameras import Cameras
    from nerfstudio.data.scene_box import OrientedBox

    pose = torch.eye(4)[None, :3]
    pose[:, 2, 3] = 3.0
    camera = Cameras(camera_to_worlds=pose, fx=40.0, fy=40.0, cx=25.0, cy=17.0, height=34, width=50)
    ours = model(background_color="black").eval()
    whole = ours.get_outputs_for_camera(camera)
    assert whole["rgb"].shape == (34, 50, 3) and whole["depth"].shape == whole["accumulation"].shape == (34, 50, 1)
    assert whole["background"].shape == (34, 50, 3) and whole["accumulation"].max() > 0.05
    seen = whole["accumulation"] > 0.05
    assert 2.4 < whole["depth"][seen].min() and whole["depth"][seen].max() < 3.6
    half = OrientedBox(torch.eye(3), torch.tensor([0.5, 0, 0]), torch.ones(3))
    cropped = ours.get_outputs_for_camera(camera, obb_box=half)["accumulation"]
    assert cropped.sum() < 0.8 * whole["accumulation"].sum()
    nothing = OrientedBox(torch.eye(3), torch.full((3,), 50.0), torch.ones(3))
    assert ours.get_outputs_for_camera(camera, obb_box=nothing)["rgb"].max() == 0


def test_a_distorted_camera_is_rendered_through_its_lens():
    from nerfstudio.cameras.cameras import Cameras

    pose = torch.eye(4)[None, :3]
    pose[:, 2, 3] = 2.0
    lens = {"fx": 40.0, "fy": 40.0, "cx": 25.0, "cy": 17.0, "height": 34, "width": 50}
    ours = model(background_color="black").train()
    ours.strategy.step_pre_backward = lambda *args: None
    ours.optimizers = {}
    straight = ours.get_outputs(Cameras(camera_to_worlds=pose, **lens))["rgb"]
    bent = ours.get_outputs(
        Cameras(camera_to_worlds=pose, **lens, distortion_params=torch.tensor([[0.3, 0, 0, 0, 0, 0]]))
    )
    assert bent["rgb"].shape == (34, 50, 3) and bent["depth"] is None
    # Barrel distortion of k1 > 0 pushes outwards what lies off the axis, and leaves the middle.
    assert (bent["rgb"] - straight).abs()[15:19, 23:27].max() < 0.02
    assert (bent["rgb"] - straight).abs().max() > 0.02
    bent["rgb"].sum().backward()
    assert ours.means.grad.abs().sum() > 0


def test_context_frames_are_ours(tmp_path):
    """The same pixels and cameras as the feed-forward methods get, in an order that the seed fixes."""
    scene = write_scene(tmp_path / "scene", num_frames=12, size=(50, 60))
    options = {"data": scene, "image_size": (32, 32), "context_frames": (1, 5, 8), "num_initial_points": 100}
    manager = ContextFramesDataManagerConfig(**options).setup(device="cpu", test_mode="val")
    shown = manager.shown_scene()
    assert shown.context_names == ("001", "005", "008")
    assert torch.equal(manager.context_images, shown.views.context.rgb[0])
    assert not set(shown.target_names) & set(shown.context_names)
    seen = [manager.next_train(step)[1]["image_idx"] for step in range(6)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]
    camera, batch = manager.next_train(4)
    assert camera.shape == (1,) and batch["image"].shape == (32, 32, 3) and batch["image_idx"] == seen[4]
    assert set(manager.train_dataparser_outputs.metadata) == {"points3D_xyz", "points3D_rgb"}
    inference = ContextFramesDataManagerConfig(**options).setup(device="cpu", test_mode="inference")
    assert inference.train_dataparser_outputs.metadata == {}


def test_the_benchmark_writes_its_table_and_plot(tmp_path):
    run_cli(
        "python", "-m", "scripts.benchmarks.splatting", "--output", "speed.json", "--sizes", "16",
        "--gaussians", "10", "40", "--repeats", "2", "--beside", "tests", cwd=tmp_path,
    )  # fmt: skip
    result = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["cloud"], row["gaussians"]) for row in result["rows"]] == [
        ("surface", 10), ("surface", 40), ("volume", 10), ("volume", 40)
    ]  # fmt: skip
    assert result["backend"] == "cpu" and result["beside"] == "tests"
    assert all(0 < row["iterations_per_second"]["median"] < 1e4 for row in result["rows"])
    assert "| volume | 16 px | " in (tmp_path / "speed.md").read_text()
    assert Image.open(tmp_path / "speed.png").size[0] > 300


def test_bad_input(data, tmp_path):
    with pytest.raises(
        DataError, match="has 3 scenes, and splatting fits one: name it with --pipeline.datamanager.scene"
    ):
        ContextFramesDataManagerConfig(data=data).setup(device="cpu", test_mode="val")
    with pytest.raises(DataError, match="has no such scene"):
        ContextFramesDataManagerConfig(data=data, scene="chair").setup(device="cpu", test_mode="val")
    with pytest.raises(DataError, match="initial-points points with points-file None"):
        ContextFramesDataManagerConfig(initial_points="points")
    broken = write_scene(tmp_path / "scene", num_frames=8)
    edit_json(broken / "transforms.json", lambda meta: meta["frames"].__delitem__(slice(2, None)))
    with pytest.raises(DataError, match="2 frames for context and 0 others for targets; expected at least 5"):
        ContextFramesDataManagerConfig(data=broken).setup(device="cpu", test_mode="val")
