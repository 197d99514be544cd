"""`elvsm data rooms`, run on a tiny furniture library made here; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from test_make_object_scenes import NO_OPENGL, split_of

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data.images import ImageSpec
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.geometry import CanonicalFrame

pytest.importorskip("trimesh", reason='needs pip install "elvsm-nerfstudio[objects]"')
pytest.importorskip("moderngl", reason='needs pip install "elvsm-nerfstudio[objects]"')

SIZES = {  # title -> category, width, depth, height in cm
    "Sofa": ("Living room", 190, 90, 80), "Table": ("Living room", 120, 80, 75), "Chair": ("Living room", 45, 50, 90),
    "Bookcase": ("Living room", 90, 35, 180), "Bed": ("Bedroom", 140, 200, 60), "Desk": ("Office", 140, 70, 74),
    "Oven": ("Kitchen", 60, 60, 90), "Cupboard": ("Kitchen", 80, 50, 85), "Toilet": ("Bathroom", 40, 60, 75),
    "Cabinet": ("Bathroom", 60, 45, 85), "Shelf": ("Office", 90, 40, 120), "Chest": ("Bedroom", 90, 50, 70),
    "Stool": ("Bathroom", 40, 40, 45), "Vase": ("Living room", 20, 20, 30), "Plant": ("Bedroom", 25, 25, 45),
}  # fmt: skip


needs_opengl = pytest.mark.skipif(NO_OPENGL is not None, reason="no OpenGL 3.3 context from EGL")


@pytest.fixture(scope="module")
def furniture(tmp_path_factory) -> Path:
    """A furniture cache: boxes of one colour each, every kind once in every split."""
    cache = tmp_path_factory.mktemp("room_furniture")
    library = cache / "libraries" / "Fake"
    corners = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
    faces = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]
    box = "\n".join(f"v {x} {y} {z}" for x, y, z in corners) + "\nusemtl paint\n"
    box += "\n".join("f " + " ".join(map(str, face)) for face in faces) + "\n"
    catalogue, number = ["license=Public domain"], 0
    for split in ("train", "val", "test"):
        for title, (category, width, depth, height) in SIZES.items():
            number += 1
            stem = title.lower()
            name = next(f"{stem}{i}" for i in range(1000) if split_of(f"fake-{stem}{i}") == split)
            folder = library / "fake" / name
            folder.mkdir(parents=True)
            rgb = np.random.default_rng(number).uniform(0.2, 0.9, 3)
            (folder / "m.mtl").write_text(f"newmtl paint\nKd {rgb[0]} {rgb[1]} {rgb[2]}\n")
            (folder / f"{name}.obj").write_text(f"mtllib m.mtl\n{box}")
            entry = {"name": title, "model": f"/fake/{name}/{name}.obj", "category": category, "creator": "Nobody"}
            entry |= {"width": width, "depth": depth, "height": height}
            if title in ("Sofa", "Chair"):
                entry["dropOnTopElevation"] = 45  # a seat, on which nothing is to be put
            catalogue += [f"{key}#{number}={value}" for key, value in entry.items()]
    (library / "PluginFurnitureCatalog.properties").write_text("\n".join(catalogue))
    return cache


@pytest.fixture(scope="module")
def train_furniture(furniture) -> list:
    from elvsm_nerfstudio.synthetic.furniture import read_furniture

    return [item for item in read_furniture(furniture / "libraries", ()) if item.split == "train"]


@pytest.fixture(scope="module")
def plans(train_furniture):
    """The module, and fifty plans of train furniture."""
    from elvsm_nerfstudio.synthetic import room_layout

    return room_layout, [room_layout.plan_room(np.random.default_rng(seed), train_furniture) for seed in range(50)]


def run_script(furniture: Path, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "elvsm_nerfstudio.cli",
        "data",
        "rooms",
        "--output",
        output,
        "--furniture-cache",
        furniture,
    ]
    command += ["--num-rooms", "4", "--num-val-rooms", "1", "--num-test-rooms", "1", "--resolution", "24", "40"]
    return subprocess.run([str(part) for part in [*command, *options]], capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(furniture, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("rooms") / "rooms"
    result = run_script(furniture, output, "--chunks", str(output.parent / "chunks"))
    assert result.returncode == 0, result.stderr
    return output


# Plans


def test_furniture_stands_in_the_room_and_apart(plans):
    layout, rooms = plans
    for plan in rooms:
        boxes = np.stack([piece.box for piece in plan.furniture])
        assert (boxes >= -1e-9).all() and (boxes[:, 1] <= np.array(plan.size)).all()
        overlap = np.minimum(boxes[:, None, 1], boxes[None, :, 1]) - np.maximum(boxes[:, None, 0], boxes[None, :, 0])
        overlapping = (overlap > 1e-6).all(axis=-1)
        assert not (overlapping & ~np.eye(len(boxes), dtype=bool)).any()
        for piece in plan.furniture:
            assert piece.box[1, 2] - piece.box[0, 2] == pytest.approx(piece.item.size[2])
            stands = piece.bottom == 0 or any(
                other.box[1, 2] == pytest.approx(piece.bottom) and (other.box[0, :2] < piece.centre).all()
                and (other.box[1, :2] > piece.centre).all() for other in plan.furniture
            )  # fmt: skip
            assert stands, (piece, plan.kind)
    assert {plan.kind for plan in rooms} == set(layout.KINDS)
    assert 6 < np.mean([len(plan.furniture) for plan in rooms]) < 30
    assert any(piece.bottom > 0 for plan in rooms for piece in plan.furniture)


def test_walks_are_slow_smooth_level_and_touch_nothing(plans):
    layout, rooms = plans
    for plan in rooms:
        poses = plan.walk.poses
        assert 60 <= len(poses) <= 100 and 45 <= plan.walk.field_of_view_degrees <= 70
        centres = poses[:, :3, 3]
        assert (centres[:, 2] >= 1.2).all() and (centres[:, 2] <= 1.7).all()
        assert 0.7 < np.linalg.norm(centres[-1] - centres[0]) < 2.5
        steps = np.diff(centres, axis=0)
        assert np.linalg.norm(steps, axis=1).max() < 0.06 and np.abs(np.diff(steps, axis=0)).max() < 0.003
        assert np.allclose(poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.eye(3), atol=1e-9)
        assert np.allclose(poses[:, 2, 0], 0) and (poses[:, 2, 1] > 0.9).all()
        pan = np.degrees(np.arccos(np.clip(poses[0, :3, 2] @ poses[-1, :3, 2], -1, 1)))
        assert pan <= layout.MAX_PAN_DEGREES + 1e-6
        assert (centres[:, :2] > 0.3 - 1e-9).all() and (centres[:, :2] < np.array(plan.size[:2]) - 0.3 + 1e-9).all()
        for piece in plan.furniture:
            outside = np.maximum(np.maximum(piece.box[0] - centres, centres - piece.box[1]), 0)
            assert np.linalg.norm(outside, axis=1).min() >= 0.3 - 1e-9


def test_plans_depend_on_the_generator_alone(plans, train_furniture):
    layout, rooms = plans
    again = layout.plan_room(np.random.default_rng(7), train_furniture)
    assert again.size == rooms[7].size and np.array_equal(again.walk.poses, rooms[7].walk.poses)
    assert [piece.box.tolist() for piece in again.furniture] == [piece.box.tolist() for piece in rooms[7].furniture]


def test_too_little_furniture_is_refused(plans):
    layout, _ = plans
    with pytest.raises(ValueError, match="found no room with four pieces of furniture"):
        layout.plan_room(np.random.default_rng(0), [])


# Scenes


@needs_opengl
def test_splits_differ_in_furniture(made):
    scenes = json.loads((made / "scenes.json").read_text())
    assert [scene["split"] for scene in scenes["scenes"]] == ["test", "val", "train", "train"]
    for scene in scenes["scenes"]:
        room = json.loads((made / scene["path"] / "transforms.json").read_text())["room"]
        assert {split_of(name) for name in room["furniture"]} == {scene["split"]}
        assert set(room["furniture"]) <= set(scenes["furniture"])
    assert scenes["furniture"][next(iter(scenes["furniture"]))]["creator"] == "Nobody"


@needs_opengl
def test_evaluation_index_has_targets_between_context(made):
    index = json.loads((made / "evaluation_index.json").read_text())
    assert list(index) == ["room_00000"]
    (first, last), targets = index["room_00000"]["context"], index["room_00000"]["target"]
    assert 45 <= last - first < 60 and len(set(targets)) == 3 and all(first < target < last for target in targets)
    assert json.loads((made.parent / "chunks/evaluation_index.json").read_text()) == index


@needs_opengl
def test_rooms_are_made_again_bit_by_bit_and_finished_ones_are_kept(made, furniture, tmp_path):
    result = run_script(furniture, tmp_path / "again")
    assert result.returncode == 0 and "0 rooms were there already" in result.stderr
    for file in made.glob("room_*/images/*.png"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(made)).read_bytes()
    kept = tmp_path / "again/room_00001/transforms.json"
    written = kept.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "again/room_00002")
    (tmp_path / "again/room_00003/images/010.png").unlink()
    result = run_script(furniture, tmp_path / "again")
    assert "2 rooms were there already" in result.stderr and kept.stat().st_mtime_ns == written
    assert (tmp_path / "again/room_00002/images/000.png").exists()
    assert (tmp_path / "again/room_00003/images/010.png").exists()
    other = run_script(furniture, tmp_path / "again", "--seed", "1")
    assert other.returncode != 0 and "made with" in other.stderr and "Choose another --output" in other.stderr


@needs_opengl
def test_chunks_are_the_same_scenes(made):
    spec = ImageSpec((24, 24))
    collections = [SceneCollection.open(path, NerfstudioDataParserConfig()) for path in (made, made.parent / "chunks")]
    assert len({len(collection.entries) for collection in collections}) == 1
    for name in ("room_00000", "room_00003"):
        scenes = [c.load(next(e for e in c.entries if e.name == name)) for c in collections]
        assert scenes[0].num_frames == scenes[1].num_frames
        frames = range(0, scenes[0].num_frames, 9)
        images = [scene.read_images(frames, spec).float() for scene in scenes]
        error, other = (images[0] - images[1]).abs().mean(), (images[0] - images[1].roll(1, dims=0)).abs().mean()
        assert error < 8 and error < 0.5 * other  # JPEG takes its share of pictures of 24 pixels
        views = [views_from_cameras(scene.cropped_cameras(frames, spec), 1) for scene in scenes]
        canonical = [CanonicalFrame.estimate(v.camera_to_world).apply(v.camera_to_world) for v in views]
        assert torch.allclose(canonical[0], canonical[1], atol=1e-4)
        assert torch.allclose(views[0].directions, views[1].directions, atol=1e-5)
    written = torch.load(made.parent / "chunks/train/000000.torch", weights_only=True)
    assert written[0]["cameras"].shape[1] == 18 and written[0]["images"][0].dtype == torch.uint8


@needs_opengl
def test_furniture_is_seen_where_its_box_projects(furniture):
    """In an otherwise empty room, from several cameras: the red pixels are within and up to the edges of the box."""
    code = f"""
import json
from pathlib import Path
import numpy as np
from elvsm_nerfstudio.synthetic.furniture import read_furniture
from elvsm_nerfstudio.synthetic.room_layout import Placed, RoomPlan, Walk, WallPanel, _pose
from elvsm_nerfstudio.synthetic.room_mesh import build_room
from elvsm_nerfstudio.synthetic.room_renderer import RoomRenderer, draw_lighting

item = next(i for i in read_furniture(Path({str(furniture / "libraries")!r}), ()) if i.title == "Sofa")
piece = Placed(item, (3.0, 2.5), 0.0, 1)
poses = np.stack([_pose(np.array([1.0, 1.0, 1.5]), yaw, -0.25) for yaw in (0.3, 0.6, 0.9)])
window = WallPanel(1, 2.0, 1.5, (1.0, 1.0), "window")
plan = RoomPlan("living", (5.0, 4.5, 2.6), (piece,), (window,), Walk(poses, 60.0))
mesh = build_room(np.random.default_rng(0), plan)
for surface in mesh.surfaces:
    surface.emission, surface.texture, surface.color = 1.0, None, (0.0, 0.0, 0.2)
mesh.surfaces[-1].color = (1.0, 0.0, 0.0)
renderer = RoomRenderer((120, 160))
renderer.set_room(plan, draw_lighting(np.random.default_rng(0), plan))
focal = 80 / np.tan(np.radians(30))
corners = np.array([[x, y, z, 1] for x in piece.box[:, 0] for y in piece.box[:, 1] for z in piece.box[:, 2]])
for pose, picture in zip(poses, renderer.render(mesh, poses, focal)):
    local = corners @ np.linalg.inv(pose).T
    x, y = 80 - focal * local[:, 0] / local[:, 2], 60 + focal * local[:, 1] / local[:, 2]
    rows, columns = np.nonzero(picture[..., 0] > 100)
    seen = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
    print(json.dumps([x.min(), x.max(), y.min(), y.max(), *map(int, seen)]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [np.array(json.loads(line)) for line in result.stdout.splitlines()]
    assert len(lines) == 3
    for line in lines:
        expected = np.clip(line[:4], 0, (160, 160, 120, 120))
        assert np.abs(expected - line[4:]).max() <= 1.5, line


def test_a_room_that_cannot_be_written_leaves_nothing(plans, tmp_path, monkeypatch):
    from elvsm_nerfstudio.synthetic.rooms import Room, write_room

    plan = plans[1][0]
    pictures = np.zeros((len(plan.walk.poses), 8, 8, 3), np.uint8)
    save, saved = Image.Image.save, []

    def fail_at_the_third(self, path: Path, **options) -> None:
        saved.append(path)
        if len(saved) == 3:
            raise OSError("no space left")
        save(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail_at_the_third)
        with pytest.raises(OSError, match="no space"):
            write_room(tmp_path, Room("room-0", "train"), plan, pictures, 8.0, {})
    assert saved[1].exists() is False and not any(tmp_path.iterdir())
    write_room(tmp_path, Room("room-0", "train"), plan, pictures, 8.0, {})
    assert len(list((tmp_path / "room-0/images").iterdir())) == len(pictures)


@needs_opengl
def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    from elvsm_nerfstudio.synthetic.rooms import write_video

    def fail(path: Path, frames, fps: int) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("mediapy.write_video", fail)
    monkeypatch.setattr("shutil.which", lambda program: program)
    with pytest.raises(OSError, match="no space"):
        write_video(tmp_path, [])
    assert not any(tmp_path.iterdir())


def test_contact_sheet_and_video_can_be_looked_at(made):
    import mediapy

    assert Image.open(made / "contact_sheet.png").size[0] == 2 * 4 * 192
    assert len(mediapy.read_video(made / "walkthrough.mp4")) >= 4 * 60


@pytest.mark.parametrize(
    "options, message",
    [
        (("--num-rooms", "2"), "--num-rooms: found 2; expected at least 3, one more than the held-out rooms"),
        (("--resolution", "8", "40"), "--resolution: found 8; expected at least 16"),
        (("--num-workers", "0"), "--num-workers: found 0; expected at least 1"),
    ],
)
def test_bad_numbers_are_refused(furniture, tmp_path, options, message):
    result = run_script(furniture, tmp_path / "rooms", *options)
    assert result.returncode != 0 and message in result.stderr


def test_an_output_that_is_a_file_is_refused(furniture, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script(furniture, tmp_path / "file")
    assert result.returncode != 0 and "which cannot be made a folder" in result.stderr
