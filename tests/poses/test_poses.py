"""Photos and videos to captures: cameras against those that the pictures were made with, and what can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import look_at, need_shared
from PIL import Image

from elvsm_nerfstudio.cli import main
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.geometry import opengl_to_opencv, pinhole_directions
from elvsm_nerfstudio.poses import capture as capture_module
from elvsm_nerfstudio.poses.capture import PoseOptions, PoseReport, make_capture
from elvsm_nerfstudio.poses.mapping import pairs_to_match, write_model
from elvsm_nerfstudio.poses.photos import EXIF, copy_photos, find_photos
from elvsm_nerfstudio.poses.video import extract_sharp_frames
from elvsm_nerfstudio.show.journey import open_capture
from elvsm_nerfstudio.stages import Stages

SIZE = (150, 200)
"""Height and width."""
FOCAL = 220.0


def find_poses(source: Path, output: Path, **options) -> PoseReport:
    return make_capture(source, output, PoseOptions(**options), Stages(silent=True))


def textured_corner(poses: torch.Tensor) -> np.ndarray:
    """uint8 [view, height, width, 3]: a corner of three textured walls, seen from within."""
    generator = torch.Generator().manual_seed(3)
    texture = sum(
        torch.nn.functional.interpolate(
            torch.rand(3, 3, side, side, generator=generator), size=(256, 256), mode="bilinear"
        )
        for side in (16, 64, 128)
    )
    camera = opengl_to_opencv(poses)
    directions = pinhole_directions(torch.tensor([FOCAL, FOCAL, SIZE[1] / 2, SIZE[0] / 2]).expand(len(poses), 4), *SIZE)
    directions = torch.einsum("vij,vhwj->vhwi", camera[:, :3, :3], directions)
    origin = camera[:, None, None, :3, 3]
    depth = (-1.0 - origin) / directions  # the walls are x, y, z = -1
    depth = torch.where(depth > 0, depth, torch.inf)
    wall = depth.argmin(dim=-1)
    hit = origin + depth.amin(dim=-1, keepdim=True) * directions
    across = torch.tensor([[1, 2], [0, 2], [0, 1]])[wall]
    where = torch.gather(hit, -1, across).remainder(4.0) / 2 - 1
    rgb = torch.stack(
        [
            torch.nn.functional.grid_sample(
                texture[w : w + 1].expand(len(poses), -1, -1, -1), where, align_corners=False
            )
            for w in range(3)
        ],
        dim=-1,
    )
    chosen = torch.gather(rgb, -1, wall[:, None, :, :, None].expand(-1, 3, -1, -1, 1))[..., 0]
    return (chosen.permute(0, 2, 3, 1) / 3 * 255).round().byte().numpy()


def poses_of_corner(count: int) -> torch.Tensor:
    """OpenGL camera-to-world [count, 4, 4]."""
    angle = torch.linspace(0.25, 1.3, count)
    positions = torch.stack([2.2 * angle.cos(), 2.2 * angle.sin(), 0.8 + 0.4 * (3 * angle).sin()], dim=-1)
    poses = torch.stack([look_at(p + 0.6) for p in positions])
    poses[:, :3, 3] -= 0.6
    return poses


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A folder of 8 photos with a name with a space and EXIF, and their poses."""
    folder = tmp_path_factory.mktemp("photos")
    poses = poses_of_corner(8)
    for i, pixels in enumerate(textured_corner(poses)):
        Image.fromarray(pixels).save(folder / f"photo {i}.jpg", quality=95, exif=exif())
    return folder, poses


def exif(orientation: int = 1) -> Image.Exif:
    tags = Image.Exif()
    tags[EXIF.Make], tags[EXIF.Model], tags[EXIF.Orientation] = "Maker", "Camera", orientation
    details = tags.get_ifd(EXIF.ExifOffset)
    details[EXIF.FocalLengthIn35mmFilm] = round(FOCAL / SIZE[1] * 36)
    return tags


@pytest.fixture(scope="session")
def made(photos, tmp_path_factory) -> tuple[Path, PoseReport]:
    """The capture of these photos."""
    pytest.importorskip("pycolmap")
    output = tmp_path_factory.mktemp("made") / "capture"
    stages = Stages(silent=True)
    report = make_capture(photos[0], output, PoseOptions(), stages)
    with stages.stage("What comes later", 1):
        pass
    return output, report


def errors(found: Path, expected: dict[str, np.ndarray]) -> tuple[float, float]:
    """Median rotation error in degrees, and of the centres as a share of their extent, after the best similarity."""
    meta = json.loads((found / "transforms.json").read_text())
    poses = {Path(frame["file_path"]).name: np.array(frame["transform_matrix"]) for frame in meta["frames"]}
    names = sorted(set(poses) & set(expected))
    ours, theirs = (np.stack([p[name] for name in names]) for p in (poses, expected))
    u, _, v = np.linalg.svd(sum(b[:3, :3] @ a[:3, :3].T for a, b in zip(ours, theirs)))
    world = u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v
    relative = (world @ ours[:, :3, :3]).transpose(0, 2, 1) @ theirs[:, :3, :3]
    angles = np.degrees(np.arccos(np.clip((np.trace(relative, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    a = (ours[:, :3, 3] - ours[:, :3, 3].mean(0)) @ world.T
    b = theirs[:, :3, 3] - theirs[:, :3, 3].mean(0)
    distance = np.linalg.norm((a * b).sum() / (a * a).sum() * a - b, axis=-1)
    extent = np.linalg.norm(b[:, None] - b[None], axis=-1).max()
    return float(np.median(angles)), float(np.median(distance) / extent)


def test_cameras_of_rendered_photos_are_found(made, photos):
    output, report = made
    expected = {f"photo_{i}.jpg": pose.numpy() for i, pose in enumerate(photos[1])}
    rotation, centre = errors(output, expected)
    assert report.registered == report.photos == 8 and not report.missing
    assert rotation < 0.5 and centre < 0.005
    assert report.reprojection_error < 1
    assert list(report.seconds) == ["Photos", "Features", "Pairs of photos", "Cameras"]
    [camera] = report.cameras
    assert camera["parameters"][0] == pytest.approx(FOCAL, rel=0.02)
    assert camera["focal_length_from_exif"] and (camera["height"], camera["width"]) == SIZE


def test_capture_is_read_by_the_dataparser_and_has_picture_and_points(made):
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    output, report = made
    outputs = NerfstudioDataParserConfig(data=output, load_3D_points=True).setup().get_dataparser_outputs("train")
    assert len(outputs.image_filenames) == 8 and all(file.is_file() for file in outputs.image_filenames)
    assert len(outputs.metadata["points3D_xyz"]) == report.points > 100
    with Image.open(output / "poses.png") as picture:
        assert picture.width > 800 and np.asarray(picture.convert("L")).std() > 5
    assert PoseReport(**json.loads((output / "poses.json").read_text())) == report


def test_called_again_it_returns_the_report_without_work(made, photos, monkeypatch):
    output, report = made
    monkeypatch.setattr(capture_module, "copy_photos", None)
    assert find_poses(photos[0], output) == report


def test_goes_on_where_it_was_interrupted(made, photos, tmp_path, monkeypatch):
    output, report = made
    again = tmp_path / "capture"
    shutil.copytree(output, again)
    state = json.loads((again / "colmap/source.json").read_text())
    (again / "colmap/source.json").write_text(json.dumps({"source": state["source"]}))
    for name in ("transforms.json", "poses.json"):
        (again / name).unlink()
    for image in (again / "images").iterdir():  # in which no features could be found any more
        times = image.stat().st_atime_ns, image.stat().st_mtime_ns
        Image.new("RGB", SIZE[::-1]).save(image)
        os.utime(image, ns=times)
    found = find_poses(photos[0], again)
    assert (found.registered, found.missing, found.points) == (8, [], report.points)
    assert (again / "transforms.json").is_file()


def test_other_photos_begin_anew_and_nothing_of_others_is_touched(made, photos, tmp_path):
    again = tmp_path / "capture"
    shutil.copytree(made[0], again)
    fewer = tmp_path / "photos"
    fewer.mkdir()
    for name in ("photo 0.jpg", "photo 1.jpg"):
        shutil.copy(photos[0] / name, fewer)
    Image.new("RGB", SIZE[::-1]).save(fewer / "black.png")
    with pytest.raises(DataError, match=r"cameras of [02] of 3 photos were found.*black.png(.|\n)*What helps"):
        find_poses(fewer, again)
    assert not (again / "transforms.json").exists()
    (again / "colmap/source.json").unlink()
    with pytest.raises(DataError, match="not of this program; choose another --output"):
        find_poses(photos[0], again)
    shutil.rmtree(again / "colmap")
    (again / "transforms.json").write_text("{}")
    with pytest.raises(DataError, match="holds a capture already"):
        find_poses(photos[0], again)
    assert (again / "transforms.json").read_text() == "{}"


def test_photos_that_do_not_fit_are_named_and_the_rest_is_a_capture(photos, tmp_path):
    pytest.importorskip("pycolmap")
    folder = tmp_path / "photos"
    shutil.copytree(photos[0], folder)
    Image.new("RGB", SIZE[::-1], "grey").save(folder / "wall.png")
    report = find_poses(folder, tmp_path / "capture")
    assert report.missing == ["wall.png"] and report.registered == 8
    assert len(json.loads((tmp_path / "capture/transforms.json").read_text())["frames"]) == 8


def test_photos_that_are_turned_become_upright_and_share_a_camera_only_with_their_like(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15] = 255  # white above, as the sensor saw it
    for i, orientation in enumerate((1, 1, 6)):  # 6: to be turned clockwise
        Image.fromarray(pixels).save(folder / f"{i}.jpg", exif=exif(orientation), quality=95)
    Image.fromarray(pixels).save(folder / "3.webp", lossless=True)
    copied = copy_photos(find_photos(folder), tmp_path / "images", lambda: None)
    assert [photo.name for photo in copied] == ["0.jpg", "1.jpg", "2.jpg", "3.png"]
    assert copied[0].camera == copied[1].camera and len({photo.camera for photo in copied}) == 3
    assert (tmp_path / "images/0.jpg").read_bytes() == (folder / "0.jpg").read_bytes()
    with Image.open(tmp_path / "images/2.jpg") as turned:
        assert turned.size == (30, 40) and turned.getexif().get(EXIF.Orientation, 1) == 1
        assert turned.getexif().get_ifd(EXIF.ExifOffset)[EXIF.FocalLengthIn35mmFilm] == 40
        right_left = np.asarray(turned)[20, [25, 5], 0]
    assert right_left[0] > 200 and right_left[1] < 50


def test_photos_in_the_captures_own_folder_are_used_in_place_and_never_changed(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 30)).save(images / "a.png")
    before = (images / "a.png").stat().st_mtime_ns
    assert [photo.name for photo in copy_photos(find_photos(images), images, lambda: None)] == ["a.png"]
    assert (images / "a.png").stat().st_mtime_ns == before
    Image.new("RGB", (40, 30)).save(images / "b.jpg", exif=exif(6))
    Image.new("RGB", (40, 30)).save(images / "c d.png")
    for name in ("b.jpg", "c d.png"):
        with pytest.raises(DataError, match="choose another --output"):
            copy_photos([images / name], images, lambda: None)
    assert sorted(file.name for file in images.iterdir()) == ["a.png", "b.jpg", "c d.png"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "found nothing"),
        ({"a.txt": b"x"}, r"found \.txt"),
        ({"sub/a.jpg": b"x"}, "found some in its subfolder .*sub: name that one"),
        ({"clip.MOV": b"x"}, "found the video clip.MOV: name the file itself"),
        ({"a.heic": b"x"}, "HEIC files: convert them to JPEG"),
        ({"a.jpg": b"x", "b.jpg": b"x"}, r"found 2 photos; expected at least 3\nWhat helps"),
        ({"a.jpg": b"x", "b.jpg": b"x", "c.jpg": b"x"}, "a.jpg cannot be read .*take it out of the folder"),
    ],
)
def test_folders_that_cannot_be_used(files, message, tmp_path):
    pytest.importorskip("pycolmap")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_poses(folder, tmp_path / "capture")
    assert not (tmp_path / "capture/transforms.json").exists()


def test_without_pycolmap_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(ValueError, match=r"pip install 'elvsm-nerfstudio\[poses\]'"):
        find_poses(tmp_path, tmp_path / "capture")


def test_a_model_is_there_whole_or_not_at_all(tmp_path):
    class Model:
        def __init__(self, names):
            self.names = names

        def write_binary(self, folder: Path) -> None:
            for name in self.names:
                if name is None:
                    raise OSError("no space left")
                (folder / name).write_bytes(b"content")

    model = tmp_path / "sparse" / "0"
    write_model(Model(["cameras.bin", "stale.bin"]), model)
    write_model(Model(["cameras.bin", "images.bin"]), model)
    assert sorted(file.name for file in model.iterdir()) == ["cameras.bin", "images.bin"]
    with pytest.raises(OSError, match="no space"):
        write_model(Model(["cameras.bin", None]), model)
    assert not any((tmp_path / "sparse").iterdir())


def test_pairs():
    names = [f"{i:04d}" for i in range(200)]
    assert len(pairs_to_match(names[:60], "auto", from_video=True)) == 60 * 59 // 2
    assert len(pairs_to_match(names, "auto", from_video=False)) == 200 * 199 // 2
    neighbours = pairs_to_match(names, "auto", from_video=True)
    steps = {int(b) - int(a) for a, b in neighbours}
    assert steps == {*range(1, 11), 16, 32, 64, 128} and len(set(neighbours)) == len(neighbours) < 2600


def test_command_line(made, photos, capsys):
    main(["poses", str(photos[0]), "--output", str(made[0]), "--num-frames", "60", "--matching", "auto"])
    printed = capsys.readouterr().out
    assert "8 of 8 photos have a camera" in printed and f"elvsm show {made[0]}" in printed


@pytest.mark.parametrize("place", ["sparse", "sparse/0", "colmap/sparse/0"])
def test_models_of_other_tools_are_found_where_these_write_them(place, made, photos, tmp_path):
    shutil.copytree(made[0] / "images", tmp_path / "images")
    shutil.copytree(made[0] / "colmap/sparse/0", tmp_path / place)
    scene = open_capture(tmp_path)
    assert scene.num_frames == 8 and scene.sizes == [SIZE] * 8
    # The same camera as in the capture: nerfstudio moves and scales both worlds by rules of its own.
    found, expected = scene.cameras.camera_to_worlds[:, :, 3], open_capture(made[0]).cameras.camera_to_worlds[:, :, 3]
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(expected, expected), atol=0.02, rtol=0.02)


def test_show_from_photos_alone(made, photos, tmp_path, capsys):
    output = tmp_path / "shown"
    shutil.copytree(made[0], output / "capture")  # as a call that was interrupted after the cameras has left it
    main(["show", str(photos[0]), "--output", str(output), "--seconds", "0.25", "--num-context-views", "2"])
    said = capsys.readouterr().out
    assert said.index("Your photos have a background") < said.index("Encoding took")
    report = json.loads((output / "show.json").read_text())
    assert report["poses"]["registered"] == 8 and report["capture"] == str(output / "capture")
    assert set(report["context"]) | set(report["photos_not_given"]) == {f"photo_{i}" for i in range(8)}
    assert (output / "video.mp4").stat().st_size > 1000


# Videos


def write_video(path: Path, frames: list[np.ndarray], rate: int = 20, codec: str = "libx264") -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_sharp_frames_at_even_spacing(tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 255, (48, 32, 1), np.uint8)
    sharp_at = [5, 13, 26, 34]  # in the middle halves of four stretches of ten
    frames = []
    for i in range(40):
        right = noise if i in sharp_at else np.full_like(noise, 128)
        frames.append(np.concatenate([np.full_like(noise, 6 * i), right], axis=1).repeat(3, axis=2))
    told: list[float] = []
    files = extract_sharp_frames(write_video(tmp_path / "a.mp4", frames), tmp_path / "images", 4, told.append)
    numbers = [np.asarray(Image.open(file))[:, :24].mean() / 6 for file in files]
    assert [file.name for file in files] == [f"frame_{i:05d}.jpg" for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(numbers, sharp_at, atol=0.5)
    assert told == sorted(told) and told[-1] > 0.9


def test_a_short_video_gives_all_its_frames(tmp_path):
    frames = [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)]
    files = extract_sharp_frames(write_video(tmp_path / "a.mp4", frames), tmp_path / "images", 60, lambda share: None)
    assert len(files) == 5


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_files_that_are_no_video(content, tmp_path):
    pytest.importorskip("pycolmap")
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read|does not exist"):
        find_poses(path, tmp_path / "capture")


def test_frames_of_a_video_are_not_taken_twice(tmp_path, monkeypatch):
    pytest.importorskip("pycolmap")
    path = write_video(tmp_path / "a.mp4", [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)])
    for extract in (extract_sharp_frames, None):
        monkeypatch.setattr(capture_module, "extract_sharp_frames", extract)
        with pytest.raises(DataError, match="cameras of 0 of 5 photos"):
            find_poses(path, tmp_path / "capture")


# Real photos


@pytest.mark.slow
@pytest.mark.parametrize("name, step, registered", [("mary_rose", 3, 15), ("fox", 3, 16)])
def test_cameras_of_real_photos_are_found(name, step, registered, tmp_path):
    pytest.importorskip("pycolmap")
    scene = need_shared(f"data/{name}")
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in sorted((scene / "images").iterdir())[::step]:
        shutil.copy(photo, folder)
    report = find_poses(folder, tmp_path / "capture")
    rotation, centre = errors(tmp_path / "capture", known_poses(scene))
    assert report.registered >= registered
    assert rotation < 1.5 and centre < 0.01


def known_poses(scene: Path) -> dict[str, np.ndarray]:
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    return {Path(frame["file_path"]).name: np.array(frame["transform_matrix"]) for frame in frames}


@pytest.mark.slow
def test_show_from_all_photos_of_a_real_capture_alone(tmp_path, capsys):
    pytest.importorskip("pycolmap")
    scene, output = need_shared("data/mary_rose"), tmp_path / "shown"
    main(["show", str(scene / "images"), "--output", str(output), "--seconds", "1"])
    said = capsys.readouterr()
    report = json.loads((output / "show.json").read_text())
    rotation, centre = errors(output / "capture", known_poses(scene))
    assert report["poses"]["registered"] == 69 and rotation < 0.5 and centre < 0.005
    assert report["way"] == "around the scene" and min(report["psnr_not_given"]) > 10
    assert (output / "video.mp4").stat().st_size > 10_000
    assert "69 of 69 photos have a camera" in said.out and "arning" not in said.out + said.err
