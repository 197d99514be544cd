"""`elvsm stream`: a run trained for two steps, a scene replayed, and folders that grow meanwhile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mediapy
import numpy as np
import pytest
import torch
from conftest import TINY_NETWORK, run_cli, tiny_pipeline, write_scene
from PIL import Image


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def config(workspace, collection) -> Path:
    run_cli(
        "ns-train", "efficient-lvsm-tiny", *TINY_NETWORK, "--data", str(collection), "--machine.device-type", "cpu",
        "--vis", "tensorboard", "--max-num-iterations", "2", "--output-dir", "outputs", "--experiment-name", "stream",
        "--timestamp", "run", "--pipeline.model.precision", "fp32", cwd=workspace,
    )  # fmt: skip
    return workspace / "outputs/stream/efficient-lvsm-tiny/run/config.yml"


def render_stream(workspace: Path, config: Path, *options: object, check: bool = True):
    return run_cli("elvsm", "stream", "--load-config", str(config), *options, cwd=workspace, check=check)


def check_outputs(workspace: Path, name: str, num_views: int) -> dict:
    """The JSON, after what holds of every stream."""
    result = json.loads((workspace / f"{name}.json").read_text())
    video = mediapy.read_video(workspace / f"{name}.mp4")
    assert len(video) == len(result["steps"]) == num_views
    assert [step["num_views"] for step in result["steps"]] == list(range(1, num_views + 1))
    sizes = [step["memory_bytes"] for step in result["steps"]]
    assert sizes == [sizes[0] * count for count in range(1, num_views + 1)]
    for step in result["steps"]:
        assert step["append_ms"] > 0 and step["render_ms"] > 0 and len(step["psnr"]) == len(result["targets"])
    picture = np.asarray(Image.open(workspace / f"{name}.png")).astype(float)
    assert picture.shape == video[-1].shape and np.abs(picture - video[-1]).mean() < 4  # the video is lossy
    assert not list(workspace.glob(".*partial*"))
    return result


@pytest.mark.parametrize("order", ["capture", "farthest-point"])
def test_the_last_render_is_that_from_all_views_at_once(workspace, config, order, monkeypatch):
    render_stream(workspace, config, "--output", f"{order}.mp4", "--order", order)
    result = check_outputs(workspace, order, num_views=6)
    names = [step["view"] for step in result["steps"]]
    assert len(result["targets"]) == 2 and not set(names) & set(result["targets"])
    assert sorted([*names, *result["targets"]]) == [f"{i:03d}" for i in range(8)]
    assert (names == sorted(names)) == (order == "capture") and result["frame_fixed_by"] == names[:2]
    monkeypatch.chdir(workspace)
    assert result["steps"][-1]["psnr"] == pytest.approx(
        psnr_from_all_at_once(workspace, config, names, result), abs=1e-3
    )


def psnr_from_all_at_once(workspace: Path, config: Path, names: list[str], result: dict) -> list[float]:
    """PSNR of the targets rendered from one encoding of all views, in the frame of the first two."""
    from nerfstudio.utils.eval_utils import eval_setup

    from elvsm_nerfstudio.cameras import views_from_cameras
    from elvsm_nerfstudio.evaluation.metrics import psnr
    from elvsm_nerfstudio.geometry import CanonicalFrame

    _, pipeline, _, _ = eval_setup(config, test_mode="test")
    data, model = pipeline.datamanager, pipeline.model
    scene, spec = data.collection.load(data.shown), data.config.images
    assert scene.name == result["source"]

    def views(frames: list[str]):
        index = [int(frame) for frame in frames]
        rgb = scene.read_images(index, spec).float() / 255
        return views_from_cameras(scene.cropped_cameras(index, spec), 1, rgb)

    context, target = views(names), views(result["targets"])
    frame = CanonicalFrame.estimate(context.camera_to_world[:, :2])
    with torch.no_grad():
        rgb = model.network.decode(model.network.encode(context, frame), target)
    return [float(psnr(a, b)) for a, b in zip(rgb[0], target.rgb[0])]


def test_targets_rendered_in_one_call_are_those_rendered_one_by_one(scene, monkeypatch):
    from elvsm_nerfstudio.viewer.stream_views import replayed
    from elvsm_nerfstudio.viewer.streaming import Stream

    pipeline = tiny_pipeline(scene)
    model, data = pipeline.model, pipeline.datamanager
    views = list(replayed(data.collection.load(data.shown), range(5), data.config.images, model.device))

    def steps() -> list:
        stream = Stream(model, views[:2], views[2:])
        found = [(stream.add(view), torch.stack(stream.renders)) for view in views[:2]]
        assert all(step.render_ms > 0 for step, _ in found)
        return [(step.psnr, renders) for step, renders in found]

    expected = steps()
    monkeypatch.setattr(model, "frames_per_call", lambda height, width: 2)
    calls, render = [], model.render_frames
    monkeypatch.setattr(model, "render_frames", lambda m, c: calls.append(len(c)) or render(m, c))
    for (psnr, renders), (their_psnr, theirs) in zip(steps(), expected, strict=True):
        torch.testing.assert_close(renders, theirs, atol=1e-6, rtol=0)
        assert len(psnr) == 3 and psnr == pytest.approx(their_psnr, abs=1e-4)
    assert set(calls) == {2, 1}


def test_other_data_of_another_size_and_fewer_views(workspace, config, tmp_path):
    data = write_scene(tmp_path / "large", num_frames=12, size=(45, 33), seed=9)
    render_stream(workspace, config, "--output", "large.mp4", "--data", data, "--num-views", "3", "--num-targets", "1")
    result = check_outputs(workspace, "large", num_views=3)
    assert result["source"] == "large" and len(result["targets"]) == 1


def test_a_growing_folder_is_watched(workspace, config, tmp_path):
    """Frames come one by one; the JSON is half written once, an image comes late, one is cut short for a while."""
    whole, folder = write_scene(tmp_path / "whole", num_frames=7, seed=5), tmp_path / "growing"
    meta = json.loads((whole / "transforms.json").read_text())
    (folder / "images").mkdir(parents=True)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "elvsm_nerfstudio.cli", "stream", "--load-config", str(config),
         "--output", "watched.mp4", "--watch", str(folder), "--idle-seconds", "4"],
        cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def copy(index: int) -> None:
        shutil.copy(whole / "images" / f"{index:03d}.png", folder / "images")

    def listing(count: int) -> str:
        return json.dumps({**meta, "frames": meta["frames"][:count]})

    transforms = folder / "transforms.json"
    for count in range(1, 5):
        copy(count - 1)
        transforms.write_text(listing(count))
    wait_for(workspace / "watched.json")  # the first four have been taken in
    transforms.write_text(listing(5)[:-40])
    time.sleep(0.6)
    encoded = (whole / "images/004.png").read_bytes()
    (folder / "images/004.png").write_bytes(encoded[: len(encoded) // 2])
    transforms.write_text(listing(7))  # 5 and 6 are listed, their images not there
    copy(6)
    time.sleep(1.0)
    (folder / "images/004.png").write_bytes(encoded)
    output, _ = watcher.communicate(timeout=120)
    assert watcher.returncode == 0, output
    result = check_outputs(workspace, "watched", num_views=4)
    assert result["frame_fixed_by"] == ["000", "001"] and result["targets"] == ["002", "003"]
    assert [step["view"] for step in result["steps"]] == ["000", "001", "006", "004"]
    assert list(result["unreadable"]) == ["images/005.png"]
    assert "005.png does not exist" in "".join(output.split("\n"))


def wait_for(path: Path, seconds: float = 60.0) -> None:
    start = time.monotonic()
    while not path.exists():
        assert time.monotonic() - start < seconds, f"{path} did not come"
        time.sleep(0.05)


def test_without_enough_frames_it_stops_and_says_why(workspace, config, tmp_path):
    (tmp_path / "empty").mkdir()
    options = "--output", "none.mp4", "--watch", tmp_path / "empty", "--idle-seconds", "0.5"
    nothing = render_stream(workspace, config, *options, check=False)
    assert nothing.returncode != 0
    assert "0 views arrived; expected at least 2 to fix the canonical frame and 2 to hold out" in nothing.stderr
    assert not list(workspace.glob("*none*"))


def test_an_unreadable_image_of_a_scene_is_named(workspace, config, tmp_path):
    data = write_scene(tmp_path / "spoilt", num_frames=10, seed=3)
    (data / "images/004.png").write_bytes(b"no image")
    options = "--output", "spoilt.mp4", "--data", data, "--num-targets", "1"
    result = render_stream(workspace, config, *options, check=False)
    assert result.returncode != 0 and "004.png cannot be read" in result.stderr
    assert not list(workspace.glob("*spoilt*.mp4"))
