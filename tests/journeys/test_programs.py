"""nerfstudio's programs on runs of this package: moved ones, and what they cannot do."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import look_at, write_scene
from nerfstudio.scripts import render
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from tiny_training import no_writers_are_left, tiny_trainer  # noqa: F401

from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.model import EfficientLVSMModel


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project with a capture in data/spheres and a run of one iteration, started there; read only."""
    folder = tmp_path_factory.mktemp("project")
    write_scene(folder / "data" / "spheres", num_frames=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trainer = tiny_trainer(Path("outputs"), Path("data/spheres"), max_num_iterations=1)
        trainer.config.save_config()
        trainer.train_iteration(0)
        trainer.save_checkpoint(0)
    return folder


RUN = Path("outputs/a/efficient-lvsm-tiny/run")


@pytest.fixture
def run(project, tmp_path) -> Path:
    """A copy of the project that is somewhere else, its run renamed; the working directory is another one."""
    shutil.copytree(project / "data", tmp_path / "moved" / "data")
    folder = tmp_path / "moved" / "runs" / "renamed"
    shutil.copytree(project / RUN, folder)
    return folder


def test_a_moved_run_is_read_from_another_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, pipeline, checkpoint, step = eval_setup(run / "config.yml")
    assert (checkpoint, step) == (run / "nerfstudio_models" / "step-000000000.ckpt", 0)
    assert config.get_base_dir() == run
    assert pipeline.datamanager.config.data == tmp_path / "moved" / "data" / "spheres"


def test_data_that_are_gone_are_named_with_the_way_out(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "moved" / "data")
    with pytest.raises(DataError, match=r"needs data/spheres, which.* elvsm run --from-run .*/config.yml --data DATA"):
        eval_setup(run / "config.yml")


def test_a_config_written_on_windows_is_read(run):
    config = run / "config.yml"
    text = config.read_text()
    assert text.count("pathlib.PosixPath") >= 3
    config.write_text(text.replace("pathlib.PosixPath", "pathlib.WindowsPath"))
    _, pipeline, _, _ = eval_setup(config)
    assert pipeline.datamanager.shown.name == "spheres"


def called_as(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments])


@pytest.mark.parametrize("what", ["pointcloud", "tsdf", "poisson"])
def test_there_is_no_geometry_to_export(run, monkeypatch, what):
    called_as(monkeypatch, "bin/ns-export", what, "--load-config", "x")
    with pytest.raises(ValueError, match=f"ns-export {what}: this method renders images and knows neither depths"):
        eval_setup(run / "config.yml")


def test_the_nearest_camera_is_shown_beside_a_render(run, tmp_path, monkeypatch):
    called_as(monkeypatch, "ns-render", "interpolate", "--pose-source", "train")
    command = render.RenderInterpolated(
        load_config=run / "config.yml",
        output_path=tmp_path / "path.mp4",
        pose_source="train",
        interpolation_steps=1,
        output_format="images",
        image_format="png",
        render_nearest_camera=True,
    )
    monkeypatch.setattr("nerfstudio.utils.install_checks.check_ffmpeg_installed", lambda: None)
    command.main()
    written = sorted((tmp_path / "path").iterdir())
    assert len(written) == 1
    frame = np.array(Image.open(written[0]))
    assert frame.shape == (16, 32, 3) and frame[:, 16:].std() > 1


def test_frames_of_a_spiral_are_as_large_as_the_photos(run, tmp_path, monkeypatch):
    called_as(monkeypatch, "ns-render", "spiral")
    monkeypatch.setattr("nerfstudio.utils.install_checks.check_ffmpeg_installed", lambda: None)
    options = dict(load_config=run / "config.yml", output_path=tmp_path / "path.mp4", output_format="images")
    render.SpiralRender(**options, seconds=0.05).main()
    (frame,) = (tmp_path / "path").iterdir()
    assert Image.open(frame).size == (16, 16)


@pytest.mark.parametrize("zoom", [False, True])
def test_frames_of_a_path_are_rendered_in_one_call_and_those_that_are_rendered_alone(run, tmp_path, monkeypatch, zoom):
    called_as(monkeypatch, "ns-render", "camera-path")
    monkeypatch.setattr("nerfstudio.utils.install_checks.check_ffmpeg_installed", lambda: None)
    poses = look_at_path(7)
    path = {
        "camera_type": "perspective", "render_height": 24, "render_width": 20, "seconds": 1.0,
        "camera_path": [
            {"camera_to_world": pose.flatten().tolist(), "fov": 50.0 + 3 * zoom * i, "aspect": 20 / 24}
            for i, pose in enumerate(poses)
        ],
    }  # fmt: skip
    (tmp_path / "path.json").write_text(json.dumps(path))
    calls, render_frames = [], EfficientLVSMModel.render_frames
    monkeypatch.setattr(
        EfficientLVSMModel, "render_frames", lambda self, m, c: calls.append(len(c)) or render_frames(self, m, c)
    )

    def rendered(name: str) -> list[np.ndarray]:
        options = dict(output_format="images", image_format="png", camera_path_filename=tmp_path / "path.json")
        render.RenderCameraPath(load_config=run / "config.yml", output_path=tmp_path / f"{name}.mp4", **options).main()
        return [np.asarray(Image.open(file)).astype(int) for file in sorted((tmp_path / name).iterdir())]

    alone = rendered("alone")
    assert calls == [1] * 7
    monkeypatch.setattr(EfficientLVSMModel, "frames_per_call", lambda self, height, width: 3)
    calls.clear()
    together = rendered("together")
    assert calls == ([3, *[1] * 6] if zoom else [3, 3, 1])
    np.testing.assert_allclose(together, alone, atol=1)
    assert np.abs(alone[0] - alone[3]).max() > 5


def look_at_path(count: int) -> torch.Tensor:
    angles = torch.linspace(0, 2, count)
    return torch.stack([look_at(torch.stack([3 * a.cos(), 3 * a.sin(), torch.tensor(0.5)])) for a in angles])


def test_the_only_image_of_a_split_keeps_its_name(run, tmp_path, monkeypatch):
    called_as(monkeypatch, "ns-render", "dataset")
    render.DatasetRender(load_config=run / "config.yml", output_path=tmp_path / "renders", image_format="png").main()
    (held_out,) = (tmp_path / "renders/test/rgb").iterdir()
    assert held_out.parent.name == "rgb" and held_out.name in {f"{i:03d}.png" for i in range(12)}


def test_a_path_needs_two_photos(run, tmp_path, monkeypatch):
    called_as(monkeypatch, "ns-render", "interpolate", "--load-config", "x")
    with pytest.raises(ValueError, match="scene spheres has one. Give --pose-source train"):
        eval_setup(run / "config.yml")
