"""elvsm show: from a capture to a video, and what is said before."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, look_at, write_scene
from PIL import Image

from elvsm_nerfstudio.cli import main
from elvsm_nerfstudio.geometry import opengl_to_opencv, pinhole_directions
from elvsm_nerfstudio.model import EfficientLVSMModel
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.weights import save_weights
from elvsm_nerfstudio.show import journey
from elvsm_nerfstudio.show.expectations import expectations, share_cut_off, whole_size
from elvsm_nerfstudio.show.film import enlarged, write_gif, write_mp4
from elvsm_nerfstudio.show.journey import film_path, open_capture
from elvsm_nerfstudio.training.run_config import read_run_config
from elvsm_nerfstudio.views import Views

RELATIVE = EfficientLVSMConfig(camera_encoding="prope", ray_frame="camera")


@pytest.mark.parametrize(
    "photo, trained, expected",
    [
        ((1080, 1920), (64, 64), (64, 112)),
        ((1920, 1080), (64, 64), (112, 64)),
        ((768, 1024), (128, 128), (128, 168)),
        ((1024, 768), (64, 64), (88, 64)),
        ((500, 500), (256, 256), (256, 256)),
        ((300, 3000), (64, 64), (64, 160)),
    ],
)
def test_whole_photos_are_rounded_to_patches(photo, trained, expected):
    size = whole_size(photo, trained, patch_size=8)
    assert size == expected
    if max(photo) / min(photo) < 2:
        assert share_cut_off(photo, size) < 0.05


def test_what_to_expect_is_said():
    def said(*args) -> str:
        return " ".join(expectations(*args))

    room = said("pretrained", RELATIVE, (1080, 1920), (64, 112), False)
    assert "furniture in front of white" in room and "--weights efficient-lvsm-256" in room and "blur" in room
    assert "112 x 64 pixels" in room and "cut off" not in room
    thing = said("pretrained", RELATIVE, (64, 64), (64, 64), True)
    assert "never seen" not in thing and "efficient-lvsm-256" not in thing
    square = said("efficient-lvsm-256", EfficientLVSMConfig(), (1080, 1920), (256, 256), False)
    assert "RealEstate10K" in square and "44% of each photo" in square and "that aspect alone" in square
    assert "--weights pretrained" in said("efficient-lvsm-256", EfficientLVSMConfig(), (64, 64), (64, 64), True)
    assert said("mine.safetensors", RELATIVE, (64, 64), (64, 64), True).startswith("The network gets photos of 64 x 64")


# Files


def test_videos_have_even_sides_and_play_everywhere(tmp_path):
    import av

    frames = [Image.new("RGB", (31, 21), (8 * i, 100, 200)) for i in range(12)]
    write_mp4(tmp_path / "a.mp4", frames, fps=12)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert (stream.width, stream.height, stream.average_rate) == (30, 20, Fraction(12))
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert len(decoded) == 12
    np.testing.assert_allclose([x.mean((0, 1)) for x in decoded], [(8 * i, 100, 200) for i in range(12)], atol=6)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_that_fails_leaves_nothing(tmp_path):
    def frames():
        yield Image.new("RGB", (32, 32))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_mp4(tmp_path / "a.mp4", frames(), fps=12)
    assert list(tmp_path.iterdir()) == []


def test_animations(tmp_path):
    write_gif(tmp_path / "a.gif", [Image.new("RGB", (20, 10), (200, 20 * i, 0)) for i in range(5)], fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.size, image.n_frames, image.info["duration"], image.info["loop"]) == ((20, 10), 5, 100, 0)
        image.seek(4)
        np.testing.assert_allclose(np.asarray(image.convert("RGB"))[0, 0], (200, 80, 0), atol=12)


def test_small_frames_are_enlarged_by_a_whole_number():
    assert enlarged(Image.new("RGB", (112, 64))).size == (784, 448)
    assert enlarged(Image.new("RGB", (512, 600))).size == (512, 600)


# The way of the camera


def views_on_a_circle(degrees: list[float]) -> Views:
    """Looking at the middle, in this order."""
    angles = torch.tensor(degrees).deg2rad()
    poses = torch.stack([look_at(torch.stack([2 * a.cos(), 2 * a.sin(), torch.tensor(0.7)])) for a in angles])
    intrinsics = torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(1, len(degrees), 4)
    directions = pinhole_directions(8 * intrinsics, 8, 8)
    return Views(opengl_to_opencv(poses)[None], directions, intrinsics, torch.zeros(1, len(degrees), 8, 8, 3))


def azimuths(cameras) -> torch.Tensor:
    centres = cameras.camera_to_worlds[:, :, 3]
    return torch.atan2(centres[:, 1], centres[:, 0]).rad2deg() % 360


def test_where_photos_stand_all_around_the_video_goes_around():
    cameras, around = film_path(views_on_a_circle([0, 200, 90, 290, 140, 40, 250, 330]), 80)
    assert around and len(cameras) == 80
    angle = azimuths(cameras)
    steps = (angle.roll(-1) - angle + 180) % 360 - 180
    assert (steps >= -1e-3).all() and steps.sum() == pytest.approx(360, abs=1e-2)
    np.testing.assert_allclose(cameras.camera_to_worlds[:, :, 3].norm(dim=-1), math.hypot(2, 0.7), rtol=1e-3)


@pytest.mark.parametrize("first", [0, 140, 300])
def test_where_they_do_not_it_goes_along_them_and_back_and_nowhere_else(first):
    cameras, around = film_path(views_on_a_circle([first + d for d in (60, 0, 120, 90, 30)]), 60)
    assert not around and len(cameras) == 60
    angle = (azimuths(cameras) - first + 90) % 360 - 90
    assert angle.min() > -1 and angle.max() < 121
    assert angle[0] == pytest.approx(0, abs=1) and angle[30] > 110
    torch.testing.assert_close(angle, angle.flip(0))
    assert angle.diff().abs().max() < 15


def test_one_view():
    cameras, around = film_path(views_on_a_circle([30]), 6)
    assert len(cameras) == 6 and not around and cameras.camera_to_worlds.isfinite().all()


# All of it


def read_video(path: Path) -> tuple[int, tuple[int, int]]:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0)), (
            container.streams.video[0].height,
            container.streams.video[0].width,
        )


@pytest.mark.parametrize("photo, size", [((90, 160), (128, 224)), ((64, 48), (168, 128))])
def test_show_renders_whole_photos_of_a_capture(photo, size, tmp_path, capsys, monkeypatch):
    capture = write_scene(tmp_path / "chairs", num_frames=12, size=photo)
    output = tmp_path / "shown"
    args = ["show", str(capture), "--output", str(output), "--seconds", "0.5", "--num-context-views", "3"]
    grids, encoded, timed = [], [], journey.timed
    render, encode = EfficientLVSMModel._render_on_grid, EfficientLVSMModel._encode
    monkeypatch.setattr(EfficientLVSMModel, "_encode", lambda *a: (encoded.append(1), encode(*a))[1])
    monkeypatch.setattr(journey, "timed", lambda *a: (encoded.append("timed"), timed(*a))[1])
    monkeypatch.setattr(EfficientLVSMModel, "_render_on_grid", lambda *a: (grids.append(a[3:]), render(*a))[1])
    main([*args, "--gif"])
    printed = capsys.readouterr().out
    assert "checkpoint" not in printed, "nothing of how it is done"
    assert "trained on single pieces of furniture" in printed and "never seen" not in printed
    report = json.loads((output / "show.json").read_text())
    assert tuple(report["size"]) == size and len(report["context"]) == 3 and report["poses"] is None
    assert not set(report["context"]) & set(report["photos_not_given"]) and len(report["psnr_not_given"]) == 6
    frames, shape = read_video(output / "video.mp4")
    assert encoded[:3] == [1, "timed", 1] and 1 not in encoded[3:], "the time is that of encoding"
    assert grids == (frames // 2 + 6) * [(0, 0), (0, 4), (4, 0), (4, 4)], "the way back is not rendered again"
    assert report["shifted_grids"] == 4
    assert frames == 12 and shape == tuple(512 // min(size) * side for side in size)
    config = Path(report["run"])
    assert f"ns-viewer --load-config {config}" in printed and config.is_file()
    for name in ("sheet.png", "video.gif"):
        with Image.open(output / name) as image:
            assert np.asarray(image.convert("L")).std() > 5
    before = config.stat().st_mtime_ns
    # As on a GPU: as many frames in one call as pay; the same pictures.
    monkeypatch.setattr(EfficientLVSMModel, "frames_per_call", lambda self, height, width: 5)
    main(args)
    assert config.stat().st_mtime_ns > before
    again = json.loads((output / "show.json").read_text())
    assert (report["frames_per_call"], again["frames_per_call"]) == (1, 5)
    assert again["psnr_not_given"] == pytest.approx(report["psnr_not_given"], abs=0.02)
    assert read_video(output / "video.mp4") == (frames, shape)


def test_masks_cut_the_background_out(tmp_path, capsys):
    """As transparency does; masks are white where the scene is."""
    transparent = write_scene(tmp_path / "transparent", num_frames=5, size=(64, 64))
    masked = shutil.copytree(transparent, tmp_path / "masked")
    (masked / "masks").mkdir()
    for file in (masked / "images").iterdir():
        pixels = np.asarray(Image.open(file))
        Image.fromarray(np.where(pixels[..., 3:] > 0, pixels[..., :3], (200, 30, 30)).astype(np.uint8)).save(file)
        Image.fromarray(pixels[..., 3]).save(masked / "masks" / file.name)
    edit_json(
        masked / "transforms.json",
        lambda meta: [f.update(mask_path=f["file_path"].replace("images", "masks")) for f in meta["frames"]],
    )
    rgb = {}
    for capture in (transparent, masked):
        output = tmp_path / f"{capture.name}-shown"
        main(["show", str(capture), "--output", str(output), "--seconds", "0.1"])
        assert "never seen" not in capsys.readouterr().out
        pipeline = read_run_config(Path(json.loads((output / "show.json").read_text())["run"])).pipeline
        data = pipeline.datamanager.setup(device="cpu", test_mode="inference")
        rgb[capture.name] = data.shown_scene().views.context.rgb
    assert torch.equal(rgb["masked"], rgb["transparent"])
    assert 0.3 < (rgb["masked"] == 1).all(dim=-1).float().mean() < 0.95


def test_published_networks_get_the_middle_and_that_is_said(tmp_path, capsys):
    config = EfficientLVSMConfig(width=256, num_layers=4, init_std=0.035)
    save_weights(tmp_path / "mine.safetensors", config.build().state_dict(), config)
    capture = write_scene(tmp_path / "chairs", num_frames=5, size=(36, 64))
    output = tmp_path / "shown"
    weights = str(tmp_path / "mine.safetensors")
    main(["show", str(capture), "--weights", weights, "--output", str(output), "--seconds", "0.2"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "64 x 64 pixels" in said and "44% of each photo" in said
    report = json.loads((output / "show.json").read_text())
    assert report["size"] == [64, 64] and report["shifted_grids"] == 1, "it has seen no other grid of patches"
    assert read_video(output / "video.mp4") == (5, (448, 448))


def test_what_to_expect_of_published_weights_is_said_before_they_are_downloaded(tmp_path, capsys, monkeypatch):
    def downloaded(source, name):
        raise ValueError(f"{name}: no network")

    monkeypatch.setattr("elvsm_nerfstudio.nn.named_weights._downloaded", downloaded)
    capture = write_scene(tmp_path / "chairs", num_frames=4, size=(36, 64))
    with pytest.raises(SystemExit, match="efficient-lvsm-256: no network"):
        main(["show", str(capture), "--weights", "efficient-lvsm-256", "--output", str(tmp_path / "shown")])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "RealEstate10K" in said and "256 x 256 pixels" in said and "44% of each photo" in said


def test_a_capture_of_which_all_photos_are_given(tmp_path):
    capture = write_scene(tmp_path / "chairs", num_frames=3, size=(64, 64))
    main(["show", str(capture), "--output", str(tmp_path / "shown"), "--seconds", "0.1"])
    report = json.loads((tmp_path / "shown/show.json").read_text())
    assert (len(report["context"]), report["photos_not_given"]) == (3, [])
    with Image.open(tmp_path / "shown/sheet.png") as sheet:
        assert sheet.height < 500  # two rows


def test_folders_of_others_are_not_written_to(tmp_path):
    capture = write_scene(tmp_path / "chairs", num_frames=4)
    (tmp_path / "shown/run").mkdir(parents=True)
    (tmp_path / "shown/run/mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not of this program; choose another --output"):
        main(["show", str(capture), "--output", str(tmp_path / "shown")])
    assert (tmp_path / "shown/run/mine.txt").read_text() == "mine"


def test_sources_that_cannot_be_shown(tmp_path):
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        main(["show", str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="expected photos .* found nothing"):
        main(["show", str(tmp_path / "empty")])


def test_blenders_captures_are_read(tmp_path):
    """As nerf_synthetic has them: without transforms.json, names without their endings."""
    frames = []
    for i in range(3):
        angle = 2 * np.pi * i / 3
        pose = np.eye(4)
        pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        pose[:3, 3] = 4 * pose[:3, 2]
        frames.append({"file_path": f"./train/r_{i}", "transform_matrix": pose.tolist()})
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGBA", (16, 16), (255, 0, 0, 255)).save(tmp_path / f"train/r_{i}.png")
    for split in ("train", "val", "test"):
        content = {"camera_angle_x": 0.7, "frames": frames}
        (tmp_path / f"transforms_{split}.json").write_text(json.dumps(content))
    scene = open_capture(tmp_path)
    assert len(scene.frame_names) >= 3 and float(scene.cameras.fx[0]) == pytest.approx(8 / np.tan(0.35), rel=1e-4)
