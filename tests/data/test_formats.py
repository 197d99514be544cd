"""RealEstate10K chunks and posed-JSON lists: read as they are, for this package's methods and for all others."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, sphere_scene, tiny_pipeline, write_chunk_split
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data import chunks as chunks_module
from elvsm_nerfstudio.data.images import DataError, ImageSpec
from elvsm_nerfstudio.data.posed_json_dataparser import PosedJsonDataParserConfig
from elvsm_nerfstudio.data.realestate10k_dataparser import RealEstate10KDataParserConfig
from elvsm_nerfstudio.data.samples import read_sample
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.data.view_samplers import FrameChoice
from elvsm_nerfstudio.geometry import CanonicalFrame, opengl_to_opencv
from elvsm_nerfstudio.viewer.context_pool import ContextPool

SQUARE = ImageSpec((32, 32), width_multiple=8)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The user's cache is this test's, and nothing is remembered from another one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chunks_module.read_keys.cache_clear()
    chunks_module._chunk_index.cache_clear()


def opened(path: Path) -> SceneCollection:
    return SceneCollection.open(path, NerfstudioDataParserConfig())


def load(path: Path, name: str) -> Scene:
    scenes = opened(path)
    return scenes.load(next(entry for entry in scenes.entries if entry.name == name))


def canonical(world_to_camera: torch.Tensor) -> torch.Tensor:
    poses = torch.linalg.inv(world_to_camera)[None]
    return CanonicalFrame.estimate(poses).apply(poses)


def rewrite(folder: Path, change) -> None:
    """Changes the scenes of a split's first chunk."""
    scenes = torch.load(folder / "000000.torch", weights_only=True)
    change(scenes)
    torch.save(scenes, folder / "000000.torch")


# Chunks


def test_a_chunk_gives_its_images_and_cameras(chunks):
    raw = sphere_scene(6)
    scene = load(chunks, raw["key"])
    frames = (5, 0, 3)
    images = scene.read_images(frames, SQUARE)
    for image, frame in zip(images, frames):
        whole = Image.open(io.BytesIO(raw["images"][frame].numpy().tobytes()))
        # 36 x 64 to height 32: width 56.9, rounded to 56, of which the middle 32.
        expected = whole.resize((56, 32), Image.Resampling.LANCZOS).crop((12, 0, 44, 32))
        assert np.array_equal(image.numpy(), np.array(expected))
    views = views_from_cameras(scene.cropped_cameras(range(8), SQUARE), 1)
    world_to_camera = torch.eye(4).repeat(8, 1, 1)
    world_to_camera[:, :3] = raw["cameras"][:, 6:].unflatten(1, (3, 4))
    found = CanonicalFrame.estimate(views.camera_to_world).apply(views.camera_to_world)
    assert torch.allclose(found, canonical(world_to_camera), atol=1e-5)
    fx, fy, cx, cy = raw["cameras"][0, :4] * torch.tensor([64, 36, 64, 36]) * torch.tensor([56 / 64, 32 / 36] * 2)
    expected = torch.stack([fx, fy, cx - 12, cy]) / 32
    assert torch.allclose(views.intrinsics[0, 0], expected, atol=1e-6)


def test_a_data_set_in_chunks_has_its_splits_and_takes_val_from_train(chunks):
    scenes = opened(chunks)
    assert [len(scenes.split(split)) for split in ("train", "val", "test")] == [11, 1, 3]
    assert scenes.split("test")[0].name == f"{20:016x}"
    assert [entry.name for entry in opened(chunks).split("val")] == [entry.name for entry in scenes.split("val")]


def test_offsets_are_found_once_and_kept_beside_the_data_or_in_the_cache(chunks, tmp_path, monkeypatch):
    folder = shutil.copytree(chunks, tmp_path / "re10k", ignore=shutil.ignore_patterns(".offsets"))
    key = f"{20:016x}"
    first = chunks_module.read_scene(folder / "test", key)
    assert (folder / "test/.offsets/000000.npz").exists()
    chunks_module._chunk_index.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(chunks_module, "_find_places", lambda chunk: pytest.fail("the kept offsets are not used"))
        assert chunks_module.read_scene(folder / "test", key).image_places == first.image_places
    # Cut off, as by a crash: found anew.
    (folder / "test/.offsets/000000.npz").write_bytes(b"")
    chunks_module._chunk_index.cache_clear()
    assert load(folder, f"{20:016x}").num_frames == 8
    # Another chunk under the same name: the kept offsets are stale.
    rewrite(folder / "test", lambda scenes: scenes.reverse())
    chunks_module._chunk_index.cache_clear()
    again = chunks_module.read_scene(folder / "test", key)
    assert (
        again.image_places != first.image_places and again.image(3) == sphere_scene(20)["images"][3].numpy().tobytes()
    )
    # A data folder that cannot be written to: a file stands where the folder would be made.
    shutil.rmtree(folder / "test/.offsets")
    (folder / "test/.offsets").write_text("")
    chunks_module._chunk_index.cache_clear()
    chunks_module.read_scene(folder / "test", key)
    assert len(list((tmp_path / "cache/elvsm-nerfstudio/chunk_offsets").glob("000000-*.npz"))) == 1


def test_no_chunk_is_read_as_a_whole(tmp_path, monkeypatch):
    """A frame costs its own bytes: a chunk whose other images are overwritten still gives it."""
    folder = write_chunk_split(tmp_path / "train", [[sphere_scene(0), sphere_scene(1)]])
    wanted = chunks_module.read_scene(folder, f"{1:016x}")
    data = bytearray((folder / "000000.torch").read_bytes())
    offset, length = wanted.image_places[2]
    kept = data[offset : offset + length]
    data[: offset - 1] = bytes(offset - 1)
    data[offset + length :] = bytes(len(data) - offset - length)
    (folder / "000000.torch").write_bytes(data)
    assert wanted.image(2) == bytes(kept) == sphere_scene(1)["images"][2].numpy().tobytes()


def test_other_methods_read_chunks_through_nerfstudio(chunks, tmp_path):
    key = f"{21:016x}"
    config = RealEstate10KDataParserConfig(data=chunks / "test" / key, extracted_images=tmp_path / "jpegs")
    outputs = {split: config.setup().get_dataparser_outputs(split) for split in ("train", "test")}
    assert len(outputs["train"].image_filenames) == 7 and len(outputs["test"].image_filenames) == 1
    dataset = InputDataset(outputs["train"])
    assert dataset[1]["image"].shape == (36, 64, 3) and int(dataset.cameras.width[0]) == 64
    raw = sphere_scene(21)
    number = int(outputs["train"].image_filenames[1].stem)
    assert outputs["train"].image_filenames[1].read_bytes() == raw["images"][number].numpy().tobytes()
    assert outputs["train"].cameras.camera_to_worlds[:, :, 3].abs().max() <= 1.0 + 1e-6
    # Without a key it is the first scene; the plugin finds both by its name on the command line.
    first = RealEstate10KDataParserConfig(data=chunks, extract_images=False).setup().get_dataparser_outputs("train")
    assert first.image_filenames[0].parent.name == f"{0:016x}"


def test_scenes_of_one_key_in_several_data_sets_keep_their_own_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, seed in (("one", 1), ("two", 2)):
        scene = {**sphere_scene(seed), "key": "room"}
        write_chunk_split(tmp_path / name / "test", [[scene]])
        parser = RealEstate10KDataParserConfig(data=tmp_path / name / "test/room")
        files = parser.setup().get_dataparser_outputs("train").image_filenames
        assert files[0].read_bytes() == scene["images"][int(files[0].stem)].numpy().tobytes(), name
        # Our own methods extract nothing, and read each frame's own image.
        read = opened(tmp_path / name / "test/room").load(opened(tmp_path / name / "test/room").entries[0])
        assert isinstance(read.outputs.metadata["encoded_images"][0], bytes) and read.num_frames == 8
        for frame, image in enumerate(scene["images"]):
            assert read.outputs.metadata["encoded_images"][frame] == image.numpy().tobytes()
    assert len(list((tmp_path / "cache/elvsm-nerfstudio/extracted_images").iterdir())) == 2


def test_splatfactos_data_manager_reads_a_scene_of_chunks(chunks, tmp_path):
    from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig

    parser = RealEstate10KDataParserConfig(data=chunks / "test" / f"{21:016x}", extracted_images=tmp_path / "jpegs")
    datamanager = FullImageDatamanagerConfig(dataparser=parser).setup(device="cpu", test_mode="val")
    camera, batch = datamanager.next_train(0)
    assert batch["image"].shape == (36, 64, 3) and camera.shape == (1,)
    assert len(datamanager.train_dataset) == 7 and len(datamanager.eval_dataset) == 1


def test_one_scene_of_a_data_set_is_a_capture(chunks):
    scenes = opened(chunks / "test" / f"{22:016x}")
    scene = scenes.load(scenes.split("test")[0])
    assert not scenes.whole_scenes and scene.num_frames == 8 and scene.eval_frames == (0,)
    assert scene.read_images([0], SQUARE).shape == (1, 32, 32, 3)


def write_legacy(folder: Path) -> None:
    torch.save([sphere_scene(0)], folder / "000000.torch", _use_new_zipfile_serialization=False)


def truncate(folder: Path) -> None:
    data = (folder / "000000.torch").read_bytes()
    (folder / "000000.torch").write_bytes(data[: len(data) // 2])


def turn(scenes: list[dict]) -> None:
    scenes[0]["cameras"][3, 6:9] *= 1.1


def stand_still(scenes: list[dict]) -> None:
    """All cameras in one place: t = -R c."""
    matrix = scenes[0]["cameras"][:, 6:].unflatten(1, (3, 4))
    matrix[:, :, 3] = -(matrix[:, :, :3] @ torch.tensor([1.0, 2.0, 3.0]))


def double(scenes: list[dict]) -> None:
    scenes[0]["cameras"] = scenes[0]["cameras"].double()


def without_image(scenes: list[dict]) -> None:
    scenes[0]["images"].pop()


def spoil_jpeg(scenes: list[dict]) -> None:
    scenes[0]["images"][0] = torch.arange(200, dtype=torch.uint8)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def write_evil(folder: Path) -> None:
    torch.save([{**sphere_scene(0), "url": Evil()}], folder / "000000.torch")


BAD_CHUNKS = {
    "legacy file": (write_legacy, "BadZipFile.*expected a torch.save of a list of scenes"),
    "truncated": (truncate, "BadZipFile.*Fetch the file again"),
    "missing": (lambda folder: (folder / "000000.torch").unlink(), "does not exist, though the index.json"),
    "code inside": (write_evil, "UnpicklingError: holds .*expected tensors, lists and dictionaries only"),
    "key not in chunk": (lambda folder: rewrite(folder, lambda s: s[0].update(key="other")), "has no scene 0000.*anew"),
    "short camera rows": (
        lambda folder: rewrite(folder, lambda s: s[0].update(cameras=s[0]["cameras"][:, :17].clone())),
        "camera rows of 17 numbers; expected 18",
    ),
    "doubles": (lambda folder: rewrite(folder, double), "DoubleStorage"),
    "no cameras": (lambda folder: rewrite(folder, lambda s: s[0].pop("cameras")), "KeyError: 'cameras'"),
    "image missing": (lambda folder: rewrite(folder, without_image), "7 images but 8 cameras"),
    "stretched axis": (lambda folder: rewrite(folder, turn), r"camera 3 .*R\^T R differs from 1 by"),
    "no baseline": (lambda folder: rewrite(folder, stand_still), "all its camera centres are equal"),
    "bad first image": (lambda folder: rewrite(folder, spoil_jpeg), r"000000.jpg cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_are_named(tmp_path, spoil, message):
    write_chunk_split(tmp_path / "data/test", [[sphere_scene(20)]])
    spoil(write_chunk_split(tmp_path / "data/train", [[sphere_scene(0)], [sphere_scene(1)]]))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "data", f"{0:016x}")
    assert not (Path.cwd() / "evil").exists()


def test_a_corrupt_image_in_the_middle_is_named_with_its_frame(tmp_path):
    def spoil(scenes: list[dict]) -> None:
        scenes[0]["images"][4] = scenes[0]["images"][4][:60].clone()

    for split in ("train", "test"):
        write_chunk_split(tmp_path / split, [[sphere_scene(len(split))]])
    rewrite(tmp_path / "test", spoil)
    scene = load(tmp_path, f"{4:016x}")
    assert read_sample(scene, FrameChoice((0, 1), (2,)), SQUARE).rgb.shape == (3, 32, 32, 3)
    with pytest.raises(DataError, match=f"image .*test/{4:016x}/000004.jpg cannot be read"):
        read_sample(scene, FrameChoice((0, 1), (4,)), SQUARE)


def test_keys_that_are_unknown_or_named_twice_are_refused(chunks, tmp_path):
    with pytest.raises(DataError, match="has no scene nowhere; it has 0000"):
        chunks_module.read_scene(chunks / "train", "nowhere")
    folder = write_chunk_split(tmp_path / "train", [[sphere_scene(0)]])
    (folder / "index.json").write_text('{"a": "000000.torch", "b": "000000.torch", "a": "000000.torch"}')
    with pytest.raises(DataError, match="names scenes twice: a"):
        chunks_module.read_keys(folder)
    (folder / "index.json").write_text("[]")
    chunks_module.read_keys.cache_clear()
    with pytest.raises(DataError, match="is not an index of chunks"):
        chunks_module.read_keys(folder)
    with pytest.raises(DataError, match="found no chunks; expected DIR"):
        RealEstate10KDataParserConfig(data=tmp_path / "nowhere").setup().get_dataparser_outputs()


# Posed JSON


def write_posed_json(folder: Path, seed: int, num_frames: int = 8) -> Path:
    """The same scene as ``sphere_scene`` in LVSM's layout."""
    raw = sphere_scene(seed, num_frames)
    (folder / "images" / raw["key"]).mkdir(parents=True)
    (folder / "metadata").mkdir(exist_ok=True)
    frames = []
    for i, (row, image) in enumerate(zip(raw["cameras"], raw["images"])):
        path = folder / "images" / raw["key"] / f"{i:05d}.jpg"
        path.write_bytes(image.numpy().tobytes())
        frames.append({
            "image_path": f"../images/{raw['key']}/{path.name}",
            "fxfycxcy": (row[:4] * torch.tensor([64, 36, 64, 36])).tolist(),
            "w2c": [*row[6:].view(3, 4).tolist(), [0, 0, 0, 1]],
        })  # fmt: skip
    json_path = folder / "metadata" / f"{raw['key']}.json"
    json_path.write_text(json.dumps({"scene_name": raw["key"], "frames": frames}))
    return json_path


@pytest.fixture
def posed_lists(tmp_path) -> Path:
    for split, seeds in (("train", range(5)), ("test", range(20, 22))):
        names = [write_posed_json(tmp_path / "lvsm" / split, seed).name for seed in seeds]
        (tmp_path / "lvsm" / split / "full_list.txt").write_text("".join(f"metadata/{name}\n" for name in names))
    return tmp_path / "lvsm"


def test_posed_json_and_chunks_of_the_same_scene_are_the_same(posed_lists, chunks):
    key = f"{21:016x}"
    choice = FrameChoice((1, 6), (3,))
    one, other = (read_sample(load(path, key), choice, SQUARE) for path in (posed_lists, chunks))
    assert torch.equal(one.rgb, other.rgb) and torch.allclose(one.intrinsics, other.intrinsics, atol=1e-5)
    assert torch.allclose(one.camera_to_worlds, other.camera_to_worlds, atol=1e-5)


def test_paths_from_where_the_official_preprocessing_was_started(posed_lists, tmp_path, monkeypatch):
    """It writes what it was called with, e.g. lvsm/train/images/KEY/00000.png, into lvsm/train/metadata/KEY.json."""
    key = f"{20:016x}"
    scene = posed_lists / "test/metadata" / f"{key}.json"
    expected = load(posed_lists, key).outputs.image_filenames

    def spell(meta: dict) -> None:
        for frame, file in zip(meta["frames"], expected):
            frame["image_path"] = str(file.resolve().relative_to(tmp_path.resolve()))

    edit_json(scene, spell)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        found = load(posed_lists, key).outputs.image_filenames
        assert len(found) == 8 and all(file.samefile(other) for file, other in zip(found, expected))


def test_lists_have_splits_and_are_opened_without_opening_scenes(posed_lists):
    assert [len(opened(posed_lists).split(split)) for split in ("train", "val", "test")] == [4, 1, 2]
    alone = opened(posed_lists / "train/full_list.txt")
    assert [len(alone.split(split)) for split in ("train", "val", "test")] == [3, 1, 1]
    with (posed_lists / "train/full_list.txt").open("a") as file:
        file.write("elsewhere/gone.json\n")
    with pytest.raises(DataError, match="scene gone .* cannot be used: .*gone.json is not a scene of posed frames"):
        load(posed_lists, "gone")


def name_an_image_twice(scene: Path) -> None:
    """Frame 1 gets the image of frame 5, and keeps its camera."""
    edit_json(scene, lambda meta: meta["frames"][1].update(image_path=meta["frames"][5]["image_path"]))


def test_frames_of_one_image_are_told_apart_where_a_scene_is_shown(posed_lists, tmp_path):
    key = f"{20:016x}"
    name_an_image_twice(posed_lists / "test/metadata" / f"{key}.json")
    index = tmp_path / "index.json"
    index.write_text(json.dumps({key: {"context": [1, 2], "target": [5, 6]}}))
    may_miss = dict(evaluation_index=index, index_may_miss_scenes=True)
    pipeline = tiny_pipeline(posed_lists, **may_miss)
    scene = load(posed_lists, key)
    pool = ContextPool.of_shown_scene(pipeline.datamanager)
    assert pool.context == pipeline.model.context_ids == (1, 2) and pool.frames == (0, 1, 2, 3, 4, 7)
    shown = pipeline.datamanager.shown_scene().views
    expected = opengl_to_opencv(scene.cameras.camera_to_worlds)
    assert torch.equal(shown.context.camera_to_world[0, :, :3], expected[[1, 2]])
    assert torch.equal(shown.target.camera_to_world[0, :, :3], expected[[5, 6]])
    assert torch.equal(pool.read(1).camera_to_world[0, 0, :3], expected[1])


def test_frames_of_one_image_are_told_apart_in_the_splits_of_a_capture(posed_lists):
    file = posed_lists / "test/metadata" / f"{20:016x}.json"
    name_an_image_twice(file)
    capture = SceneCollection.open(file, PosedJsonDataParserConfig(eval_interval=5))
    scene = capture.load(capture.entries[0])
    assert scene.eval_frames == (0, 5) and scene.train_frames == (1, 2, 3, 4, 6, 7)


def test_other_methods_read_posed_json_through_nerfstudio(posed_lists):
    config = PosedJsonDataParserConfig(data=posed_lists / "test/metadata" / f"{20:016x}.json", eval_mode="all")
    dataset = InputDataset(config.setup().get_dataparser_outputs("train"))
    assert len(dataset) == 8 and dataset[7]["image"].shape == (36, 64, 3)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("frames"), "KeyError: 'frames'"),
        (lambda s: s["frames"][1].pop("w2c"), "KeyError: 'w2c'"),
        (lambda s: s["frames"][1].update(w2c=[[1, 0, 0]]), 'four "fxfycxcy" and a 4x4 "w2c"'),
        (lambda s: s["frames"][0].update(image_path="gone.jpg"), "image .*gone.jpg does not exist"),
        (lambda s: s["frames"].clear(), "expected frames with"),
        (lambda s: s["frames"][2]["w2c"][0].__setitem__(0, 7.0), r"camera 2 \(.*has a pose without a rotation in it"),
    ],
    ids=["no frames", "no pose", "short pose", "no image", "empty", "no rotation"],
)
def test_bad_posed_json_is_named(posed_lists, spoil, message):
    key = f"{20:016x}"
    edit_json(posed_lists / "test/metadata" / f"{key}.json", spoil)
    with pytest.raises(DataError, match=f"scene {key} .*{message}"):
        load(posed_lists, key)


def test_scenes_of_one_name_and_empty_lists_are_refused(posed_lists):
    path = posed_lists / "train/full_list.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match=f"lists scenes twice: {0:016x}, "):
        opened(posed_lists)
    path.write_text("\n")
    with pytest.raises(DataError, match="full_list.txt lists no scenes"):
        opened(posed_lists)
