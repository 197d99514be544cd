"""Data that would be read as something else: refused, or read right, or said."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, need_shared, random_poses, write_collection, write_scene
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.dataparsers.scannet_dataparser import ScanNetDataParserConfig
from PIL import Image
from test_data import write_colmap_scene

from elvsm_nerfstudio import notices
from elvsm_nerfstudio.data import images as images_module
from elvsm_nerfstudio.data import scene as scene_module
from elvsm_nerfstudio.data import scenes as scenes_module
from elvsm_nerfstudio.data.chunks import read_keys
from elvsm_nerfstudio.data.evaluation_views import EvaluationIndex
from elvsm_nerfstudio.data.images import DataError, ImageSpec, decode_image, is_cut_out, read_image
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.data.view_geometry import farthest_point_views
from elvsm_nerfstudio.geometry import CanonicalFrame, opengl_to_opencv, view_distance
from elvsm_nerfstudio.poses.photos import copy_photos

IMAGES = ImageSpec((16, 16))


@pytest.fixture
def said(monkeypatch) -> dict[str, str]:
    """What is said, by kind, as if nothing had been before."""
    notes: dict[str, str] = {}

    def warn_once(kind: str, text: str) -> None:
        notes.setdefault(kind, text)

    for module in ("images", "scenes", "camera_checks", "posed_frames"):
        monkeypatch.setattr(f"elvsm_nerfstudio.data.{module}.warn_once", warn_once)
    return notes


def load(path: Path, dataparser=None, split: str = "train") -> Scene:
    collection = SceneCollection.open(path, dataparser or NerfstudioDataParserConfig())
    return collection.load(collection.split(split)[0])


def matrices(meta: dict, change) -> None:
    """Changes the camera-to-world [4, 4] of each frame, given its number too."""
    for i, frame in enumerate(meta["frames"]):
        frame["transform_matrix"] = change(np.array(frame["transform_matrix"]), i).tolist()


def moved(pose: np.ndarray, factor: float, offset: float = 0.0) -> np.ndarray:
    """A camera-to-world [4, 4] with another centre."""
    return np.vstack([np.column_stack([pose[:3, :3], factor * pose[:3, 3] + offset]), pose[3:]])


def write_blender_scene(folder: Path, num_frames: int = 8, **splits: list[int]) -> Path:
    """The spheres as nerf_synthetic has them: a transforms file for each split, here of some frames."""
    write_scene(folder, num_frames=num_frames)
    meta = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").unlink()
    for split, frames in splits.items():
        listed = [{**meta["frames"][i], "file_path": f"./images/{i:03d}"} for i in frames]
        (folder / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": 0.8, "frames": listed}))
    return folder


def write_scannet_scene(folder: Path, num_frames: int = 10) -> Path:
    write_scene(folder / "source", num_frames=num_frames)
    meta = json.loads((folder / "source/transforms.json").read_text())
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir()
    for i, frame in enumerate(meta["frames"]):
        Image.open(folder / "source" / frame["file_path"]).convert("RGB").save(folder / "color" / f"{i}.jpg")
        (folder / "depth" / f"{i}.png").touch()
        np.savetxt(folder / "pose" / f"{i}.txt", np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]))
    intrinsics = [[meta["fl_x"], 0, meta["cx"], 0], [0, meta["fl_y"], meta["cy"], 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.savetxt(folder / "intrinsic/intrinsic_color.txt", np.array(intrinsics))
    shutil.rmtree(folder / "source")
    return folder


# Poses and intrinsics


SPOILT_ROTATIONS = {
    "scaled alone": lambda pose, i: pose @ np.diag([2, 2, 2, 1]) if i == 3 else pose,
    "sheared": lambda pose, i: pose @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "mirrored": lambda pose, i: pose @ np.diag([-1, 1, 1, 1]) if i == 3 else pose,
    "zero": lambda pose, i: pose * ([[0, 0, 0, 1]] * 3 + [[1, 1, 1, 1]]) if i == 3 else pose,
}


@pytest.mark.parametrize("kind", SPOILT_ROTATIONS)
@pytest.mark.parametrize("dataparser", ["nerfstudio", "blender"])
def test_rotations_that_are_none_are_refused_by_frame(tmp_path, kind, dataparser):
    if dataparser == "nerfstudio":
        folder, config, files = write_scene(tmp_path / "scene"), None, ["transforms.json"]
    else:
        folder = write_blender_scene(tmp_path / "scene", train=list(range(6)), test=[6, 7])
        config, files = BlenderDataParserConfig(), ["transforms_train.json", "transforms_test.json"]
    for file in files:
        edit_json(folder / file, lambda meta: matrices(meta, SPOILT_ROTATIONS[kind]))
    frame = 0 if kind == "sheared" else 3
    with pytest.raises(DataError, match=rf"camera {frame} \(.*{frame:03d}.png\) has a pose without a rotation"):
        load(folder, config)


def test_a_scale_that_all_rotations_have_is_divided_out(tmp_path, said):
    folder = write_scene(tmp_path / "scene")
    right = load(folder).cameras.camera_to_worlds
    edit_json(folder / "transforms.json", lambda m: matrices(m, lambda pose, i: pose @ np.diag([2, 2, 2, 1])))
    assert torch.allclose(load(folder).cameras.camera_to_worlds, right, atol=1e-5)
    assert "all scaled by 2;" in said["scaled rotations"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(fl_x=0.9), r"camera 0 \(.*000.png\) has fx 0.9, fy 31.2, .*expected .* in pixels of the image"),
        (dict(cx=0.5, cy=0.5), r"camera 0 \(.*has .*cx 0.5, cy 0.5.*expected .* in pixels of the image"),
        (dict(cx=0.0, cy=0.0), "expected .* in pixels of the image"),
        (dict(w=0), r"camera 0 \(.*says that its image is 0x20 \(width x height\)"),
        (dict(h=-5), r"says that its image is 26x-5"),
        (dict(cx=float("nan")), r"camera 0 \(.*principal point at \[nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_intrinsics_that_are_no_pixels_are_refused(tmp_path, change, message):
    folder = write_scene(tmp_path / "scene")
    edit_json(folder / "transforms.json", lambda m: m.update(change))
    with pytest.raises(DataError, match=message):
        load(folder)


def test_other_axes_and_inverse_poses_are_said(tmp_path, said):
    folder = write_scene(tmp_path / "scene", num_frames=10)
    load(folder)
    assert not said
    original = (folder / "transforms.json").read_text()
    edit_json(folder / "transforms.json", lambda m: matrices(m, lambda pose, i: pose @ np.diag([1, -1, -1, 1])))
    load(folder)
    assert set(said) == {"axes"} and "OpenCV axes" in said.pop("axes")
    for change in (np.linalg.inv, lambda pose: np.linalg.inv(pose @ np.diag([1, -1, -1, 1]))):
        (folder / "transforms.json").write_text(original)
        edit_json(folder / "transforms.json", lambda m, change=change: matrices(m, lambda pose, i: change(pose)))
        load(folder)
        assert set(said) == {"inverse"} and "world-to-camera" in said.pop("inverse")


@pytest.mark.parametrize("name", ["fox", "mary_rose"])
def test_real_captures_raise_no_doubts(said, name):
    load(need_shared(f"data/{name}"))
    assert not said


def test_lenses_of_one_scene_that_differ_are_said(tmp_path, said):
    folder = write_scene(tmp_path / "scene")
    meta = json.loads((folder / "transforms.json").read_text())
    fx = meta.pop("fl_x"), meta.pop("fl_y")
    for i, frame in enumerate(meta["frames"]):
        frame.update(fl_x=fx[0] * (1.25 if i else 1.0), fl_y=fx[1])
    (folder / "transforms.json").write_text(json.dumps(meta))
    load(folder)
    assert not said
    meta["frames"][2]["fl_x"] = 1.4 * fx[0]
    (folder / "transforms.json").write_text(json.dumps(meta))
    load(folder)
    assert "differ by a factor of 1.40 (1.20 to 1.68 widths" in said["lenses"]


# Places


def test_one_camera_far_out_is_said_and_sets_no_measure(tmp_path, said):
    poses = random_poses(12, torch.Generator().manual_seed(0))
    far = poses.clone()
    far[5, :3, 3] *= 100
    without = [i for i in range(12) if i != 5]
    chosen = farthest_point_views(far[:, :3], 12)
    assert chosen[:-1] == [without[i] for i in farthest_point_views(poses[without, :3], 11)] and chosen[-1] == 5
    frame = CanonicalFrame.estimate(opengl_to_opencv(far)[None])
    local = frame.apply(opengl_to_opencv(far)[None])[0, without, :3, 3]
    assert local.abs().max() == pytest.approx(1 / CanonicalFrame.MARGIN, rel=1e-5)
    assert torch.allclose(local.mean(dim=0), torch.zeros(3), atol=1e-6)
    distance = view_distance(far, poses[:1])[0]
    assert torch.allclose(distance[without], view_distance(poses[without], poses[:1])[0], atol=1e-5)

    folder = write_scene(tmp_path / "scene", num_frames=12)
    edit_json(folder / "transforms.json", lambda m: matrices(m, lambda pose, i: moved(pose, 100 if i == 5 else 1)))
    load(folder)
    assert re.search(r"camera 5 \(.*005.png\) stands out", said["outliers"])


def test_ordinary_spreads_have_no_outliers_to_the_last_bit():
    for seed in range(5):
        poses = opengl_to_opencv(random_poses(9, torch.Generator().manual_seed(seed)))[None]
        frame = CanonicalFrame.estimate(poses)
        assert torch.equal(frame.centre, poses[:, :, :3, 3].mean(dim=1))


def test_cameras_that_only_turn_are_told_apart_by_direction():
    poses = random_poses(6, torch.Generator().manual_seed(0))
    poses[:, :3, 3] = torch.tensor([3.0, -2.0, 1.0]) + 1e-7 * torch.randn(
        6, 3, generator=torch.Generator().manual_seed(1)
    )
    expected = 1 - poses[:, :3, 2] @ poses[0, :3, 2]
    assert torch.allclose(view_distance(poses, poses[:1])[0], expected, atol=1e-5)


@pytest.mark.parametrize("offset", [4e6, 1e5])
def test_georeferenced_coordinates_are_refused_with_what_to_subtract(tmp_path, offset):
    folder = write_scene(tmp_path / "scene")
    edit_json(folder / "transforms.json", lambda m: matrices(m, lambda pose, i: moved(pose, 1, offset)))
    with pytest.raises(
        DataError, match=r"rounds away what is between them. Subtract .* \((\d+[.\d]*(e\+\d+)?(, )?){3}\)"
    ):
        load(folder)


def test_georeferenced_posed_json_loses_nothing(tmp_path):
    folder = write_scene(tmp_path / "scene")
    meta = json.loads((folder / "transforms.json").read_text())
    canonical = []
    for offset in (0.0, 4e6):
        frames = []
        for frame in meta["frames"]:
            pose = np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1])
            pose[:3, 3] += offset
            intrinsics = [meta["fl_x"], meta["fl_y"], meta["cx"], meta["cy"]]
            frames.append(
                {"image_path": frame["file_path"], "fxfycxcy": intrinsics, "w2c": np.linalg.inv(pose).tolist()}
            )
        (folder / f"{offset:.0f}.json").write_text(json.dumps({"frames": frames}))
        (folder / "list.txt").write_text(f"{offset:.0f}.json\n")
        poses = load(folder / "list.txt", split="test").cameras.camera_to_worlds
        poses = torch.cat([poses, torch.eye(4)[3:].expand(len(poses), 1, 4)], dim=1)
        canonical.append(CanonicalFrame.estimate(poses[None]).apply(poses[None]))
    assert torch.allclose(*canonical, atol=1e-5)


# Names


BAD_NAMES = ("../x", "/tmp/x", "a/b", "a\\b", "..", "", "C:x", "a\nb")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused_where_they_are_read(tmp_path, name):
    scenes = [{"name": name, "path": "a", "split": "train"}]
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": scenes}))
    with pytest.raises(DataError, match="scenes.json: the name .* (cannot be used|has control characters)"):
        SceneCollection.open(tmp_path, NerfstudioDataParserConfig())
    for number, index in enumerate(({name: "000000.torch"}, {"key": name})):
        folder = tmp_path / f"chunks_{number}"
        folder.mkdir()
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="index.json: the name"):
            read_keys(folder)
    (tmp_path / "index.json").write_text(json.dumps({name: {"context": [0], "target": [1]}}))
    with pytest.raises(DataError, match="evaluation index .*: the name"):
        EvaluationIndex.read(tmp_path / "index.json")


def test_lists_and_frames_with_bad_names_are_refused(tmp_path):
    (tmp_path / "list.txt").write_text("scenes/..\nscenes/b.json\n")
    with pytest.raises(DataError, match="the name '..' cannot be used"):
        SceneCollection.open(tmp_path / "list.txt", NerfstudioDataParserConfig())
    folder = write_scene(tmp_path / "scene")
    edit_json(folder / "transforms.json", lambda m: m["frames"][1].update(file_path="images/a\x1b[2J.png"))
    with pytest.raises(DataError, match=r"frame \d: the name .* has control characters"):
        load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(split="Train"), "scene a: split 'Train'; expected one of train, val, test"),
        (dict(split=None), "split None"),
        (dict(name=7), "the name 7 cannot be used"),
        (dict(path=7), "is not a scene list"),
    ],
    ids=["case", "null", "number", "path"],
)
def test_entries_of_collections_are_checked(tmp_path, change, message):
    entry = {"name": "a", "path": "a", "split": "train", **change}
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": [entry]}))
    with pytest.raises(DataError, match=message):
        SceneCollection.open(tmp_path, NerfstudioDataParserConfig())


# Frames and splits


def test_frames_are_in_natural_order(tmp_path):
    folder = write_scene(tmp_path / "scene", num_frames=12)
    for i in range(12):
        (folder / f"images/{i:03d}.png").rename(folder / f"images/r_{i}.png")
    poses = torch.tensor(
        [f["transform_matrix"] for f in json.loads((folder / "transforms.json").read_text())["frames"]]
    )
    edit_json(
        folder / "transforms.json",
        lambda m: [f.update(file_path=f"images/r_{i}.png") for i, f in enumerate(m["frames"])],
    )
    scene = load(folder)
    assert scene.frame_names == [f"r_{i}" for i in range(12)]
    rotations = scene.cameras.camera_to_worlds[:, :, :3]
    assert torch.allclose(rotations[0].T @ rotations[10], poses[0, :3, :3].T @ poses[10, :3, :3], atol=1e-5)


def list_splits(folder: Path, **splits: range) -> None:
    listed = {f"{split}_filenames": [f"images/{i:03d}.png" for i in frames] for split, frames in splits.items()}
    edit_json(folder / "transforms.json", lambda m: m.update(listed))


def test_training_is_validated_on_val_and_evaluation_scores_test(tmp_path, said):
    folder = write_scene(tmp_path / "scene", num_frames=12)
    list_splits(folder, train=range(6), val=range(6, 9), test=range(9, 12))
    scene = load(folder, split="val")
    assert (scene.train_frames, scene.eval_frames, scene.num_frames) == (tuple(range(6)), (6, 7, 8), 12)
    assert load(folder, split="test").eval_frames == (9, 10, 11)
    blender = write_blender_scene(tmp_path / "blender", train=[0, 1, 2, 3], val=[4, 5], test=[6, 7])
    assert load(blender, BlenderDataParserConfig(), "val").eval_frames == (4, 5)
    assert load(blender, BlenderDataParserConfig(), "test").eval_frames == (6, 7)
    assert not said
    (blender / "transforms_val.json").unlink()
    assert load(blender, BlenderDataParserConfig(), "val").eval_frames == (4, 5)  # of the six that are left
    assert "no val split" in said["no val"]


def test_whole_scenes_are_all_their_frames(tmp_path):
    write_collection(tmp_path, "train val test", num_frames=12)
    list_splits(tmp_path / "scene_0", train=range(6), val=range(6, 9), test=range(9, 12))
    list_splits(tmp_path / "scene_1", train=range(6), val=range(6, 12))
    assert load(tmp_path).train_frames == load(tmp_path, split="val").train_frames == tuple(range(12))
    write_blender_scene(tmp_path / "b", train=[0, 1, 2], val=[3, 4], test=[5, 6, 7])
    listed = [{"name": split, "path": "b", "split": split} for split in ("train", "val", "test")]
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": listed}))
    assert load(tmp_path, BlenderDataParserConfig()).train_frames == tuple(range(8))


@pytest.mark.parametrize("whole_scenes", [False, True])
def test_an_image_with_two_cameras_is_two_frames(tmp_path, said, whole_scenes):
    folder = tmp_path / "scene_0"
    write_collection(tmp_path, "train val test", num_frames=12)
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    poses = [torch.tensor(frame["transform_matrix"]) for frame in frames]
    edit_json(folder / "transforms.json", lambda m: m["frames"][7].update(file_path="images/002.png"))
    config = NerfstudioDataParserConfig(eval_mode="interval", eval_interval=4)
    scene = load(tmp_path if whole_scenes else folder, config)
    # The file's order, 0 1 2 7 3 4 5 6 8 9 10 11, of which every fourth is held out.
    assert scene.num_frames == 12 and scene.frame_names[1:5] == ["00001_001", "00002_002", "00003_002", "00004_003"]
    rotations = scene.cameras.camera_to_worlds[:, :, :3]
    for frame, of_file in ((2, 2), (3, 7), (4, 3), (11, 11)):
        expected = poses[0][:3, :3].T @ poses[of_file][:3, :3]
        assert torch.allclose(rotations[0].T @ rotations[frame], expected, atol=1e-5)
    if not whole_scenes:
        assert scene.eval_frames == (0, 4, 8) and scene.train_frames == (1, 2, 3, 5, 6, 7, 9, 10, 11)
    assert re.search(r"Scene \w+: frames 2, 3 have the same image, .*002.png;", said["images named twice"])


def test_a_frame_that_is_listed_twice_is_one(tmp_path, said):
    folder = write_scene(tmp_path / "scene", num_frames=12)
    expected = load(folder).cameras.camera_to_worlds
    edit_json(folder / "transforms.json", lambda m: m["frames"].append(m["frames"][3]))
    list_splits(folder, train=range(8), test=range(6, 12))  # two of them in both
    scene = load(folder)
    assert scene.num_frames == 12 and scene.train_frames == tuple(range(8)) and scene.eval_frames == tuple(range(6, 12))
    assert scene.cameras.camera_to_worlds.shape == expected.shape and "images named twice" not in said


# Dataparsers


def test_a_named_dataparser_is_asked_whether_it_can_read_a_folder(tmp_path):
    scene = load(write_scannet_scene(tmp_path / "room"), ScanNetDataParserConfig())
    assert scene.num_frames == 10 and len(scene.train_frames) == 9 and scene.frame_names == [str(i) for i in range(10)]
    for i in range(3):
        write_scannet_scene(tmp_path / f"rooms/{i}")
    rooms = SceneCollection.open(tmp_path / "rooms", ScanNetDataParserConfig())
    assert rooms.whole_scenes and [e.name for e in rooms.entries] == ["0", "1", "2"]
    assert rooms.load(rooms.entries[0]).num_frames == 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found 0 scenes.*ScanNetDataParser says: FileNotFoundError.*color"):
        SceneCollection.open(tmp_path / "empty", ScanNetDataParserConfig())


def test_colmap_is_found_where_it_usually_is(tmp_path):
    folder = write_colmap_scene(tmp_path / "capture")
    poses = load(folder, ColmapDataParserConfig()).cameras.camera_to_worlds
    (folder / "colmap/sparse").rename(folder / "sparse")
    (folder / "colmap").rmdir()
    assert torch.equal(load(folder, ColmapDataParserConfig()).cameras.camera_to_worlds, poses)
    (folder / "sparse/0").rename(folder / "model")
    (folder / "sparse").rmdir()
    config = ColmapDataParserConfig(colmap_path=Path("model"))
    assert torch.equal(load(folder, config).cameras.camera_to_worlds, poses)


@pytest.mark.parametrize("asked", [NerfstudioDataParserConfig, BlenderDataParserConfig, ColmapDataParserConfig])
@pytest.mark.parametrize(
    "write, name",
    [
        (write_scene, "nerfstudio-data"),
        (partial(write_blender_scene, train=[0, 1, 2], test=[3, 4]), "blender-data"),
        (write_colmap_scene, "colmap"),
    ],
)
def test_another_dataparser_is_named_where_the_files_are_its(tmp_path, write, name, asked):
    folder = write(tmp_path / "capture")
    own = {"nerfstudio-data": NerfstudioDataParserConfig, "blender-data": BlenderDataParserConfig}
    if asked is own.get(name, ColmapDataParserConfig):
        assert load(folder, asked()).num_frames > 1
        return
    with pytest.raises(DataError, match=f"cannot be used: .*files are those of the dataparser {name}, .* end the comm"):
        load(folder, asked())


def test_a_fourth_radial_coefficient_names_the_way_round(tmp_path):
    folder = write_colmap_scene(tmp_path / "capture")
    (folder / "colmap/sparse/0/cameras.txt").write_text("1 OPENCV_FISHEYE 26 20 31 31 13 10 0.1 0.01 0.001 0.0001\n")
    with pytest.raises(DataError, match="fourth radial coefficient.*transforms.json may have one"):
        load(folder, ColmapDataParserConfig())


# Images


def pixel(file: Path, size: tuple[int, int] = (4, 6)) -> list[int]:
    return read_image(file, size, ImageSpec(size))[1, 1].tolist()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path, suffix):
    Image.fromarray(np.full((4, 6), 77 * 257, np.uint16)).save(tmp_path / f"a.{suffix}")
    assert pixel(tmp_path / f"a.{suffix}") == [77] * 3


def test_photos_of_sixteen_bits_keep_their_brightness_for_structure_from_motion(tmp_path):
    Image.fromarray(np.full((4, 6), 77 * 257, np.uint16)).save(tmp_path / "a.png")
    (photo,) = copy_photos([tmp_path / "a.png"], tmp_path / "copy", lambda: None)
    assert pixel(tmp_path / "copy" / photo.name) == [77] * 3


@pytest.mark.parametrize("dtype, kind", [(np.int32, "integer"), (np.float32, "float")])
def test_images_without_a_white_are_refused(tmp_path, dtype, kind):
    Image.fromarray(np.full((4, 6), 1, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=f"a.tif has 32-bit {kind} values"):
        pixel(tmp_path / "a.tif")


def test_other_formats_name_their_conversion(tmp_path):
    for name, message in (
        ("a.HEIC", "HEIC to JPEG"),
        ("a.exr", "tone-map"),
        ("a.cr2", "develop"),
        ("a.png", "replace"),
    ):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
        with pytest.raises(DataError, match=f"{name} cannot be read.*{message}"):
            pixel(tmp_path / name)


def test_images_are_turned_where_only_that_fits_the_camera(tmp_path, said):
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[0, 0] = 255
    for orientation, corner in ((5, (0, 0)), (6, (0, 3)), (7, (5, 3)), (8, (5, 0))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
        assert read_image(tmp_path / "a.png", (4, 6), ImageSpec((4, 6)))[0, 0, 0] == 255
        turned = read_image(tmp_path / "a.png", (6, 4), ImageSpec((6, 4)))
        assert np.argwhere(turned[..., 0] == 255).tolist() == [list(corner)]
        with pytest.raises(DataError, match=rf"a.png is 6x4 \(4x6 as its EXIF orientation {orientation} shows it\)"):
            read_image(tmp_path / "a.png", (8, 8), ImageSpec((4, 4)))
    assert not said
    exif[0x0112] = 3
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png", (4, 6), ImageSpec((4, 6)))[0, 0, 0] == 255
    assert "EXIF orientation 3, and its size does not tell" in said["EXIF orientation"]


def test_sizes_are_compared_before_pixels_are_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(images_module, "eight_bits", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="a.png is 400x400, but its camera says 6x4"):
        pixel(tmp_path / "a.png")


def test_masks_are_alpha_on_the_background(tmp_path):
    folder = write_scene(tmp_path / "scene")
    for i in range(8):
        Image.new("RGB", (26, 20), (10, 200, 30)).save(folder / f"images/{i:03d}.png")
    (folder / "masks").mkdir()
    mask = np.zeros((20, 26), np.uint8)
    mask[:, 16:] = 1
    for i in range(8):
        Image.fromarray(mask if i else mask * 0 + 255).save(folder / f"masks/{i}.png")
    edit_json(
        folder / "transforms.json", lambda m: [f.update(mask_path=f"masks/{i}.png") for i, f in enumerate(m["frames"])]
    )
    for background, colour in (("white", [255] * 3), ("black", [0] * 3)):
        image = load(folder).read_images([3], ImageSpec((20, 26), background))[0]
        assert image[5, 2].tolist() == colour and image[5, 20].tolist() == [10, 200, 30]
        assert load(folder).read_images([0], ImageSpec((20, 26), background))[0, 5, 2].tolist() == [10, 200, 30]
    assert not is_cut_out(folder / "images/000.png") and is_cut_out(
        folder / "images/000.png", mask=folder / "masks/1.png"
    )
    Image.new("L", (13, 10)).save(folder / "masks/2.png")
    with pytest.raises(DataError, match="mask .*2.png is 13x10, but its camera says 26x20"):
        load(folder).read_images([2], IMAGES)


def test_downscaled_copies_are_read_where_they_are_large_enough(tmp_path, monkeypatch):
    write_collection(tmp_path, "train val test", num_frames=4, size=(65, 131))
    folder = tmp_path / "scene_0"
    colours = {1: (255, 0, 0), 2: (0, 255, 0), 4: (0, 0, 255)}
    for reduction, colour in colours.items():
        name = "images" if reduction == 1 else f"images_{reduction}"
        (folder / name).mkdir(exist_ok=True)
        for i in range(4):
            Image.new("RGB", (131 // reduction, 65 // reduction), colour).save(folder / name / f"{i:03d}.png")

    def colour_at(size: tuple[int, int]) -> tuple[int, ...]:
        return tuple(load(tmp_path).read_images([1], ImageSpec(size))[0, 5, 5].tolist())

    assert [colour_at((side, side)) for side in (64, 33, 32, 17, 16, 8)] == [
        colours[reduction] for reduction in (1, 1, 2, 2, 4, 4)
    ]
    Image.new("RGB", (131, 65), (9, 9, 9)).save(folder / "images_4/001.png")  # no copy of a quarter's size
    assert colour_at((16, 16)) == colours[2]
    shutil.rmtree(folder / "images")
    shutil.rmtree(folder / "images_2")
    assert tuple(load(tmp_path).read_images([0], ImageSpec((64, 64)))[0, 5, 5].tolist()) == colours[4]
    with pytest.raises(DataError, match="images/001.png does not exist"):
        load(tmp_path).read_images([1], IMAGES)


def test_a_capture_is_decoded_once_within_a_bound(scene, collection, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        scene_module, "decode_image", lambda path, *args: decoded.append(path.stem) or decode_image(path, *args)
    )
    monkeypatch.setattr(scenes_module, "MAX_KEPT_BYTES", 3 * 16 * 16 * 3)
    capture = load(scene)
    first = capture.read_images([0, 1, 2, 3], IMAGES)
    assert torch.equal(capture.read_images([3, 2, 1, 0], IMAGES).flip(0), first)
    assert decoded == ["000", "001", "002", "003", "003"]
    decoded.clear()
    one_of_many = load(collection)
    one_of_many.read_images([0], IMAGES)
    one_of_many.read_images([0], IMAGES)
    assert decoded == ["000", "000"]


def test_notices_are_printed_once_and_are_not_markup(capsys, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    notices.warn_once("kind", "file [red]a[/nothing].png")
    notices.warn_once("kind", "again")
    assert capsys.readouterr().out.strip() == "file [red]a[/nothing].png"
