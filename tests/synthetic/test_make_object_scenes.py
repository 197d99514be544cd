"""`elvsm data objects`, run on a tiny furniture library made here; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("trimesh", reason='needs pip install "elvsm-nerfstudio[objects]"')
pytest.importorskip("moderngl", reason='needs pip install "elvsm-nerfstudio[objects]"')

ELVSM_DATA = (sys.executable, "-m", "elvsm_nerfstudio.cli", "data")
RESOLUTION = 48
VIEWS = 9

CUBE_FACES = {  # world direction of the face -> colour and the corners of the face in the file's axes (+Y up)
    (1, 0, 0): ((1, 0, 0), [(1, -1, -1), (1, 1, -1), (1, 1, 1), (1, -1, 1)]),
    (-1, 0, 0): ((0, 1, 0), [(-1, -1, -1), (-1, -1, 1), (-1, 1, 1), (-1, 1, -1)]),
    (0, 0, 1): ((0, 0, 1), [(-1, 1, -1), (-1, 1, 1), (1, 1, 1), (1, 1, -1)]),
    (0, 0, -1): ((1, 1, 0), [(-1, -1, -1), (1, -1, -1), (1, -1, 1), (-1, -1, 1)]),
    (0, -1, 0): ((0, 1, 1), [(-1, -1, 1), (1, -1, 1), (1, 1, 1), (-1, 1, 1)]),
    (0, 1, 0): ((1, 0, 1), [(-1, -1, -1), (-1, 1, -1), (1, 1, -1), (1, -1, -1)]),
}
WEDGE_VERTICES = np.array([[0.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 4.0]])
WEDGE_FACES = [(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)]
Y_UP_TO_Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])


def opengl_is_missing() -> str | None:
    """Tried in a process of its own: Mesa's LLVM in this one would clash with triton's, which torch loads later."""
    code = "import moderngl; moderngl.create_context(standalone=True, backend='egl', require=330).release()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return f"no OpenGL 3.3 context from EGL: {result.stderr[-200:]}" if result.returncode else None


NO_OPENGL = opengl_is_missing()


@pytest.fixture(scope="module")
def script():
    """The script as a module, for its small functions."""
    from elvsm_nerfstudio.synthetic import objects as make_object_scenes

    return make_object_scenes


# ---------------------------------------------------------------------------------------------------------------------
# A furniture library: six objects, one of them broken, all three splits
# ---------------------------------------------------------------------------------------------------------------------


def split_of(name: str) -> str:
    position = int.from_bytes(hashlib.sha256(f"elvsm/{name}".encode()).digest()[:6], "big") / 2**48
    return "val" if position < 60 / 820 else "test" if position < 120 / 820 else "train"


def folder_of_split(stem: str, split: str) -> str:
    """A model folder whose scene falls into the split."""
    return next(f"{stem}{i}" for i in range(1000) if split_of(f"fake-{stem}{i}") == split)


FOLDERS = {
    "cube": folder_of_split("cube", "test"),
    "wedge": folder_of_split("wedge", "val"),
    "tilted": folder_of_split("tilted", "train"),
    "picture": folder_of_split("picture", "train"),
    "glass": folder_of_split("glass", "train"),
    "broken": folder_of_split("broken", "train"),
}
SCENES = {key: f"fake-{folder}" for key, folder in FOLDERS.items()}


def face_lines(vertices, faces) -> str:
    lines = [f"v {x} {y} {z}" for x, y, z in vertices]
    return "\n".join(lines + ["f " + " ".join(str(index + 1) for index in face) for face in faces]) + "\n"


def write_plain(folder: Path, faces: list[tuple[int, int, int]]) -> None:
    (folder / f"{folder.name}.obj").write_text(face_lines(WEDGE_VERTICES, faces))


def write_cube(folder: Path) -> None:
    materials, lines = "", ["mtllib model.mtl"]
    for number, (color, corners) in enumerate(CUBE_FACES.values()):
        materials += f"newmtl m{number}\nKd {color[0]} {color[1]} {color[2]}\nd 1.0\n"
        lines += [f"v {x} {y} {z}" for x, y, z in corners]
        lines += [f"usemtl m{number}", "f " + " ".join(str(4 * number + corner) for corner in (1, 2, 3, 4))]
    (folder / "model.mtl").write_text(materials)
    (folder / f"{folder.name}.obj").write_text("\n".join(lines) + "\n")


def write_picture(folder: Path) -> None:
    """An upright rectangle: red and green above, blue and nothing below."""
    texture = np.zeros((32, 32, 4), dtype=np.uint8)
    texture[:16, :16] = (255, 0, 0, 255)
    texture[:16, 16:] = (0, 255, 0, 255)
    texture[16:, :16] = (0, 0, 255, 255)
    Image.fromarray(texture).save(folder / "texture.png")
    (folder / "model.mtl").write_text("newmtl paper\nKd 0 0 0\nmap_Kd texture.png\n")
    corners = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
    (folder / f"{folder.name}.obj").write_text(
        f"mtllib model.mtl\n{corners}usemtl paper\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"
    )


def write_glass(folder: Path) -> None:
    (folder / "model.mtl").write_text("newmtl glass\nKd 0.2 0.4 1\nd 0.5\n")
    faces = face_lines(WEDGE_VERTICES, WEDGE_FACES).replace("f ", "usemtl glass\nf ", 1)
    (folder / f"{folder.name}.obj").write_text(f"mtllib model.mtl\n{faces}")


@pytest.fixture(scope="module")
def furniture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furniture cache with one library."""
    cache = tmp_path_factory.mktemp("furniture")
    library = cache / "libraries" / "Fake"
    catalogue = ["# a comment", "license=Public domain"]
    for number, (key, name) in enumerate(FOLDERS.items(), start=1):
        (library / "fake" / name).mkdir(parents=True)
        catalogue += [
            f"name#{number}=The {key}",
            f"model#{number}=/fake/{name}/{name}.obj",
            f"category#{number}=Tests",
            f"creator#{number}=Ren\\u00e9",
        ]
        if key == "tilted":
            catalogue.append(f"modelRotation#{number}=1 0 0 0 0 1 0 -1 0")
    (library / "PluginFurnitureCatalog.properties").write_text("\n".join(catalogue))
    write_cube(library / "fake" / FOLDERS["cube"])
    write_picture(library / "fake" / FOLDERS["picture"])
    write_glass(library / "fake" / FOLDERS["glass"])
    for key in ("wedge", "tilted"):
        write_plain(library / "fake" / FOLDERS[key], WEDGE_FACES)
    write_plain(library / "fake" / FOLDERS["broken"], [(0, 1, 99)])
    return cache


def run_script(furniture: Path, output: Path, *options: str, renderer: str = "auto") -> subprocess.CompletedProcess:
    command = [*ELVSM_DATA, "objects", "--output", output, "--furniture-cache", furniture, "--num-workers", "1"]
    command += ["--resolution", str(RESOLUTION), "--views-per-object", str(VIEWS), "--renderer", renderer, *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.fixture(scope="module", params=["moderngl", "embreex"])
def made(request: pytest.FixtureRequest, furniture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run, with each renderer."""
    if request.param == "moderngl" and NO_OPENGL:
        pytest.skip(NO_OPENGL)
    if request.param == "embreex":
        pytest.importorskip("embreex")
    output = tmp_path_factory.mktemp(request.param) / "objects"
    done = run_script(furniture, output, renderer=request.param)
    assert done.returncode == 0, done.stderr
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and poses
# ---------------------------------------------------------------------------------------------------------------------


def read_views(scene: Path) -> list[tuple[np.ndarray, np.ndarray, dict]]:
    """[(picture [height, width, 4] uint8, camera-to-world [4, 4], transforms.json)] of a scene."""
    transforms = json.loads((scene / "transforms.json").read_text())
    return [
        (np.asarray(Image.open(scene / frame["file_path"])), np.array(frame["transform_matrix"]), transforms)
        for frame in transforms["frames"]
    ]


def project(points: np.ndarray, pose: np.ndarray, camera: dict) -> np.ndarray:
    """World points [points, 3] -> [points, 2] column and row, the top left corner of the picture being (0, 0)."""
    in_camera = (np.atleast_2d(points) - pose[:3, 3]) @ pose[:3, :3]
    assert (in_camera[:, 2] < 0).all(), "the object is behind the camera"
    x, y = in_camera[:, 0] / -in_camera[:, 2], in_camera[:, 1] / -in_camera[:, 2]
    return np.stack([camera["cx"] + camera["fl_x"] * x, camera["cy"] - camera["fl_y"] * y], axis=-1)


def pixel_at(picture: np.ndarray, point: np.ndarray, pose: np.ndarray, camera: dict) -> np.ndarray:
    column, row = project(point, pose, camera)[0]
    return picture[int(row), int(column)]


def hue(pixel: np.ndarray) -> tuple[int, ...]:
    return tuple(int(round(value / max(pixel[:3].max(), 1))) for value in pixel[:3])


def cosine_of_view(normal, point, pose: np.ndarray) -> float:
    to_camera = pose[:3, 3] - point
    return float(np.dot(normal, to_camera) / np.linalg.norm(to_camera))


def to_unit_size(vertices: np.ndarray) -> np.ndarray:
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return (vertices - (low + high) / 2) / (high - low).max()


def test_each_visible_face_of_the_cube_has_its_colour_where_the_camera_says(made: Path) -> None:
    seen = set()
    for picture, pose, camera in read_views(made / SCENES["cube"]):
        for normal, (color, _) in CUBE_FACES.items():
            centre = 0.5 * np.array(normal)
            if cosine_of_view(normal, centre, pose) > 0.25:
                pixel = pixel_at(picture, centre, pose, camera)
                assert pixel[3] == 255
                assert hue(pixel) == color
                seen.add(normal)
    assert len(seen) >= 5


@pytest.mark.parametrize(("key", "rotation"), [("wedge", np.eye(3)), ("tilted", [[1, 0, 0], [0, 0, 1], [0, -1, 0]])])
def test_the_silhouette_agrees_with_the_projected_vertices(made: Path, key: str, rotation) -> None:
    vertices = to_unit_size(WEDGE_VERTICES @ (Y_UP_TO_Z_UP @ rotation).T)
    for picture, pose, camera in read_views(made / SCENES[key]):
        rows, columns = np.nonzero(picture[..., 3] > 0)
        projected = project(vertices, pose, camera)
        np.testing.assert_allclose([columns.min(), rows.min()], projected.min(axis=0), atol=2)
        np.testing.assert_allclose([columns.max() + 1, rows.max() + 1], projected.max(axis=0), atol=2)
        assert 0 < rows.min() and 0 < columns.min() and max(rows.max(), columns.max()) < RESOLUTION - 1, "cropped"
        assert max(np.ptp(rows), np.ptp(columns)) > RESOLUTION / 3, "the object does not fill the picture"


def test_alpha_is_coverage_and_colour_is_not_premultiplied(made: Path) -> None:
    for picture, _, _ in read_views(made / SCENES["cube"]):
        alpha = picture[..., 3]
        assert alpha[0].max() == alpha[:, 0].max() == 0
        assert set(np.unique(alpha)) <= {0, 64, 128, 191, 255}
        single = picture[alpha == 64][:, :3]  # one sample, so one face: it has at least 0.4 of the light
        assert len(single) > 0 and (single.max(axis=-1) > 90).all(), "edge pixels are darkened by the background"


def test_the_texture_is_the_right_way_round_and_its_alpha_counts(made: Path) -> None:
    quarters = {(-0.25, 0, 0.25): (1, 0, 0), (0.25, 0, 0.25): (0, 1, 0), (-0.25, 0, -0.25): (0, 0, 1)}
    num_checked = 0
    for picture, pose, camera in read_views(made / SCENES["picture"]):
        if abs(cosine_of_view((0, 1, 0), np.zeros(3), pose)) < 0.4:
            continue
        num_checked += 1
        for point, color in quarters.items():
            assert hue(pixel_at(picture, np.array(point), pose, camera)) == color
        assert pixel_at(picture, np.array((0.25, 0, -0.25)), pose, camera)[3] == 0
    assert num_checked > 0


def test_half_opaque_material_covers_half(made: Path) -> None:
    for picture, _, _ in read_views(made / SCENES["glass"]):
        assert np.median(picture[..., 3][picture[..., 3] > 0]) == 128


def test_cameras_are_in_the_promised_range_and_look_at_the_object(made: Path) -> None:
    for name in (SCENES["cube"], SCENES["wedge"]):
        for _, pose, camera in read_views(made / name):
            position = pose[:3, 3]
            elevation = np.degrees(np.arcsin(position[2] / np.linalg.norm(position)))
            assert -10 <= elevation <= 60
            np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-9)
            assert np.linalg.det(pose[:3, :3]) > 0
            np.testing.assert_allclose(project(np.zeros(3), pose, camera)[0], [RESOLUTION / 2] * 2, atol=1e-6)
            assert pose[2, 1] > 0, "upside down"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_transforms_and_collection(made: Path) -> None:
    transforms = json.loads((made / SCENES["cube"] / "transforms.json").read_text())
    assert transforms["camera_model"] == "OPENCV"
    assert (transforms["w"], transforms["h"]) == (RESOLUTION, RESOLUTION)
    assert transforms["fl_x"] == pytest.approx(RESOLUTION / 2 / np.tan(np.radians(25)))
    assert [frame["file_path"] for frame in transforms["frames"]] == [f"images/{i:03d}.png" for i in range(VIEWS)]

    collection = json.loads((made / "scenes.json").read_text())
    assert collection["format"] == "elvsm-scenes/1"
    assert (collection["resolution"], collection["views_per_object"], collection["seed"]) == (RESOLUTION, VIEWS, 0)
    names = [scene["name"] for scene in collection["scenes"]]
    assert names == sorted(names) == sorted(name for key, name in SCENES.items() if key != "broken")
    assert all((made / scene["path"] / "transforms.json").is_file() for scene in collection["scenes"])
    cube = next(scene for scene in collection["scenes"] if scene["name"] == SCENES["cube"])
    assert cube == {
        "name": SCENES["cube"],
        "path": SCENES["cube"],
        "split": "test",
        "title": "The cube",
        "category": "Tests",
        "library": "Fake",
        "licence": "Public domain",
        "creator": "René",
    }
    assert Image.open(made / "contact_sheet.png").size == (12 * RESOLUTION, RESOLUTION)
    assert not list(made.glob(".*"))


def test_broken_object_is_listed_and_left_out(made: Path) -> None:
    failures = json.loads((made / "failures.json").read_text())
    assert list(failures) == [SCENES["broken"]]
    assert failures[SCENES["broken"]]["model"].endswith(f"{FOLDERS['broken']}.obj")
    assert "IndexError" in failures[SCENES["broken"]]["error"]
    assert not (made / SCENES["broken"]).exists()


def test_evaluation_index_is_disjoint_and_in_range(made: Path) -> None:
    index = json.loads((made / "evaluation_index.json").read_text())
    assert list(index) == [SCENES["cube"]]
    views = index[SCENES["cube"]]
    assert len(views["context"]) == len(views["target"]) == 4
    assert len({*views["context"], *views["target"]}) == 8
    assert {*views["context"], *views["target"]} <= set(range(VIEWS))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def modification_times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*/*.png")}


def test_resume_subset_determinism_and_other_settings(furniture: Path, tmp_path: Path) -> None:
    """One test, as every run costs two seconds."""
    output = tmp_path / "objects"
    assert run_script(furniture, output).returncode == 0
    before, times = contents(output), modification_times(output)

    # As a kill -9 leaves it: one scene is missing, another one half there under its temporary name.
    wedge = output / SCENES["wedge"]
    partial = output / f".{SCENES['wedge']}.0a1b2c3d.partial"
    wedge.rename(partial)
    (partial / "transforms.json").unlink()
    (output / SCENES["picture"] / "images" / "003.png").unlink()
    (output / "scenes.json").unlink()
    done = run_script(furniture, output)
    assert done.returncode == 0, done.stderr
    assert contents(output) == before, "the same seed gives the same bytes"
    assert not partial.exists()
    again = modification_times(output)
    rendered = {name.split("/")[0] for name in times if again[name] != times[name]}
    assert rendered == {SCENES["wedge"], SCENES["picture"]}

    refused = run_script(furniture, output, "--seed", "1")
    assert refused.returncode != 0
    assert "--output: found the scene" in refused.stderr
    assert "seed=0" in refused.stderr and "seed=1" in refused.stderr and "Choose another --output" in refused.stderr
    assert contents(output) == before

    subset = tmp_path / "subset"
    done = run_script(furniture, subset, "--num-objects", "4")  # two of train, as one of them may be the broken one
    assert done.returncode == 0, done.stderr
    scenes = json.loads((subset / "scenes.json").read_text())["scenes"]
    assert {scene["split"] for scene in scenes} == {"test", "train", "val"}
    for scene in scenes:
        assert contents(subset / scene["path"]) == contents(output / scene["path"])

    test = tmp_path / "test"
    done = run_script(furniture, test, "--splits", "test")
    assert done.returncode == 0, done.stderr
    assert [scene["name"] for scene in json.loads((test / "scenes.json").read_text())["scenes"]] == [SCENES["cube"]]
    assert contents(test / SCENES["cube"]) == contents(output / SCENES["cube"])
    assert contents(test)["evaluation_index.json"] == before["evaluation_index.json"]


def test_a_scene_that_cannot_be_written_leaves_nothing(furniture: Path, tmp_path: Path, monkeypatch) -> None:
    from elvsm_nerfstudio.synthetic import object_scene
    from elvsm_nerfstudio.synthetic.furniture import read_furniture

    class WhiteRenderer:
        def render(self, mesh, poses, focal):
            return np.full((len(poses), 8, 8, 4), 255, np.uint8)

    def fail(path: Path, content: dict) -> None:
        assert len(list((path.parent / "images").iterdir())) == 8
        raise OSError("no space left")

    cube = next(item for item in read_furniture(furniture / "libraries", ()) if item.name == SCENES["cube"])
    settings = object_scene.Settings(resolution=8, views_per_object=8, seed=0, renderer="embreex")
    with monkeypatch.context() as patch:
        patch.setattr(object_scene, "write_json", fail)
        with pytest.raises(OSError, match="no space"):
            object_scene.write_scene(cube, tmp_path, settings, WhiteRenderer())
    assert not any(tmp_path.iterdir())
    object_scene.write_scene(cube, tmp_path, settings, WhiteRenderer())
    assert [folder.name for folder in tmp_path.iterdir()] == [cube.name]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_broken_package_leaves_nothing(tmp_path: Path) -> None:
    from elvsm_nerfstudio.synthetic.furniture import InputError, prepare_furniture

    package = tmp_path / "sweethome3d-furniture_1.0_all.deb"
    package.write_text("half of it")
    (tmp_path / ".libraries.0a1b2c3d.partial").mkdir()  # as a killed process leaves it
    with pytest.raises(InputError, match="which cannot be unpacked"):
        prepare_furniture(tmp_path)
    assert list(tmp_path.iterdir()) == [package]


def test_a_set_without_test_objects_has_no_evaluation_index(script, tmp_path: Path) -> None:
    settings = script.Settings(resolution=8, views_per_object=8, seed=0, renderer="embreex")
    items = [catalogue_object(script, f"item{number}") for number in range(100)]
    test, train = (next(item for item in items if item.split == split) for split in ("test", "train"))
    script.write_collection(tmp_path, [test, train], settings)
    assert list(json.loads((tmp_path / "evaluation_index.json").read_text())) == [test.name]
    script.write_collection(tmp_path, [train], settings)
    assert not (tmp_path / "evaluation_index.json").exists()
    assert json.loads((tmp_path / "scenes.json").read_text())["evaluation_index"] is None


def test_stale_failures_file_is_removed(script, tmp_path: Path) -> None:
    (tmp_path / "failures.json").write_text("{}")
    script.report_failures(tmp_path, [], {})
    assert not (tmp_path / "failures.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Small functions
# ---------------------------------------------------------------------------------------------------------------------


def catalogue_object(script, name: str):
    return script.CatalogueObject(name, "", "", "", "Fake", "", Path(f"{name}.obj"), (1, 0, 0, 0, 1, 0, 0, 0, 1))


def test_names_and_splits_never_change(script) -> None:
    """Published numbers depend on them."""
    from elvsm_nerfstudio.synthetic.furniture import scene_name

    names = {
        ("Scopia", "/scopia/bathroom3/bathroom3.obj"): ("scopia-bathroom3", "train"),
        ("BlendSwap-CC-0", "/blendswap-cc-0/armchair/armchair.obj"): ("blendswap-cc-0-armchair", "train"),
        ("BlendSwap-CC-0", "/blendswap-cc-0/barrel/barrel.obj"): ("blendswap-cc-0-barrel", "val"),
        ("BlendSwap-CC-0", "/blendswap-cc-0/comb/comb.obj"): ("blendswap-cc-0-comb", "test"),
        ("Scopia", "/scopia/living_room_lamp1/livingroom_lamp1.obj"): (
            "scopia-living-room-lamp1-livingroom-lamp1",
            "train",
        ),
    }
    for (library, model), (name, split) in names.items():
        assert scene_name(library, model) == name
        assert catalogue_object(script, name).split == split == split_of(name)


def test_subsets_are_nested_and_hold_all_splits(script) -> None:
    objects = [catalogue_object(script, f"thing-{number:03d}") for number in range(300)]

    def select(num_objects=None, num_val=None, num_test=None) -> list:
        return script.select_objects(objects, num_objects, num_val, num_test)

    small, large = select(num_objects=5), select(num_objects=60)
    assert (len(small), len(large)) == (5, 60)
    assert {item.split for item in small} == {"train", "val", "test"}
    assert set(small) <= set(large)
    assert [item.name for item in large] == sorted(item.name for item in large)
    assert sum(item.split == "test" for item in select(num_objects=20, num_test=7)) == 7
    assert select() == objects
    with pytest.raises(script.InputError, match="--num-objects: found 301; expected 3 to 300"):
        select(num_objects=301)
    with pytest.raises(script.InputError, match="the chosen libraries hold"):
        select(num_objects=20, num_val=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views_per_object": 7}, "--views-per-object: found 7; expected at least 8"),
        ({"resolution": 0}, "--resolution: found 0; expected at least 8"),
        ({"num_workers": 0}, "--num-workers: found 0; expected at least 1"),
        ({"splits": ()}, "--splits: found , of which there is no object among the 6 selected"),
        ({"libraries": ("Fike",)}, "--libraries: found Fike; expected some of Fake"),
    ],
)
def test_bad_options_are_refused(script, furniture: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(script.InputError, match=message):
        script.make_object_scenes(script.ObjectOptions(output=tmp_path, furniture_cache=furniture, **options))


def test_context_views_are_far_apart(script) -> None:
    azimuth = np.radians([0, 1, 2, 3, 90, 91, 180, 270, 271])
    directions = np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros(9)], axis=-1)
    views = script.evaluation_views(directions, np.random.default_rng(0))
    context = np.sort(np.degrees(azimuth[views["context"]]))
    assert views["context"][0] == 0
    assert np.diff(context).min() > 80


def test_samples_are_averaged_without_the_background(script) -> None:
    samples = np.zeros((2, 4, 4), dtype=np.uint8)
    samples[0, 0] = (200, 100, 0, 255)
    samples[1, 1] = (100, 100, 50, 255)
    samples[:, 2:] = (10, 20, 30, 255)
    from elvsm_nerfstudio.synthetic.object_renderer import average_samples

    np.testing.assert_array_equal(average_samples(samples), [[[150, 100, 25, 128], [10, 20, 30, 255]]])


def test_normals_are_smooth_over_flat_edges_and_break_at_sharp_ones(script) -> None:
    from elvsm_nerfstudio.synthetic.object_mesh import corner_normals

    def roof(slope_degrees: float) -> np.ndarray:
        """Two triangles that share the edge on the Y axis, each falling by the slope."""
        x, z = np.cos(np.radians(slope_degrees)), -np.sin(np.radians(slope_degrees))
        return np.array([[[0, -1, 0], [x, 0, z], [0, 1, 0]], [[0, -1, 0], [0, 1, 0], [-x, 0, z]]])

    flat, sharp = corner_normals(roof(10)), corner_normals(roof(45))
    np.testing.assert_allclose(flat[:, [0]][0, 0], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(sharp[0], np.tile(np.sqrt([0.5, 0, 0.5]), (3, 1)), atol=1e-6)
