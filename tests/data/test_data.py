"""Images, scenes, view choices and training samples, and what happens when they are bad."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, need_shared, render_spheres, write_collection, write_scene
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data import scenes as scenes_module
from elvsm_nerfstudio.data.images import DataError, ImageSpec, read_image
from elvsm_nerfstudio.data.samples import (
    MAX_ATTEMPTS,
    Sample,
    StepBatches,
    TrainingSamples,
    read_sample,
    training_batches,
)
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.data.view_samplers import FrameChoice, RandomViewSampler
from elvsm_nerfstudio.geometry import CanonicalFrame


def opened(path: Path) -> SceneCollection:
    return SceneCollection.open(path, NerfstudioDataParserConfig())


IMAGES = ImageSpec((16, 16))


def training_samples(collection: SceneCollection, seed: int = 0, context: tuple[int, int] = (2, 2)) -> TrainingSamples:
    sampler = RandomViewSampler(2, targets_include_context=False)
    return TrainingSamples(collection, collection.split("train"), sampler, IMAGES, seed, context, samples_per_step=2)


# Images


def test_alpha_is_composited_on_the_background(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:] = (200, 100, 0, 255)
    pixels[0, 0] = (100, 100, 100, 51)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    white = read_image(tmp_path / "a.png", (4, 4), ImageSpec((4, 4)))
    black = read_image(tmp_path / "a.png", (4, 4), ImageSpec((4, 4), "black"))
    assert white[1, 0].tolist() == [255] * 3 and black[1, 0].tolist() == [0] * 3
    assert white[1, 3].tolist() == black[1, 3].tolist() == [200, 100, 0]
    assert white[0, 0].tolist() == [224] * 3 and black[0, 0].tolist() == [20] * 3


def test_images_are_resized_to_cover_and_cropped_in_the_middle(tmp_path):
    columns = np.repeat(np.arange(40, dtype=np.uint8) * 6, 3).reshape(1, 40, 3)
    Image.fromarray(np.repeat(columns, 20, axis=0)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (20, 40), ImageSpec((10, 10))).astype(float)
    # Resized to 10x20, each pixel the mean of two columns; the crop starts at column 5, i.e. columns 10 and 11.
    assert np.allclose(image[5, :, 0], np.arange(10) * 12.0 + 63, atol=1.5)


def test_grey_and_sixteen_bit_palette_images_become_rgb(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    Image.new("P", (8, 8)).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "grey.png", (8, 8), ImageSpec((8, 8)))[0, 0].tolist() == [77] * 3
    assert read_image(tmp_path / "palette.png", (8, 8), ImageSpec((8, 8))).shape == (8, 8, 3)


def test_bad_images_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"gone.png does not exist"):
        read_image(tmp_path / "gone.png", (8, 8), ImageSpec((8, 8)))
    for name in ("cut.png", "text.png"):
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            read_image(tmp_path / name, (64, 64), ImageSpec((8, 8)))
    with pytest.raises(DataError, match=r"whole.png is 64x64, but its camera says 64x32 \(width x height\)"):
        read_image(whole, (32, 64), ImageSpec((8, 8)))


# Scenes


def test_a_collection_gives_whole_scenes_by_split(collection):
    scenes = opened(collection)
    assert [len(scenes.split(split)) for split in ("train", "val", "test")] == [4, 1, 2]
    scene = scenes.load(scenes.split("test")[0])
    assert scene.name == "scene_5" and scene.num_frames == 8
    assert scene.train_frames == scene.eval_frames == tuple(range(8))


def test_a_folder_of_scenes_is_split_the_same_way_every_time(tmp_path):
    write_collection(tmp_path, "train train train train")
    (tmp_path / "scenes.json").unlink()
    first, second = opened(tmp_path), opened(tmp_path)
    assert first.entries == second.entries
    assert sorted(entry.split for entry in first.entries) == ["test", "train", "train", "val"]


def test_a_single_scene_is_split_by_its_dataparser(scene):
    scenes = opened(scene)
    loaded = scenes.load(scenes.split("train")[0])
    assert len(loaded.train_frames) == 11 and len(loaded.eval_frames) == 1
    assert not set(loaded.train_frames) & set(loaded.eval_frames)
    assert loaded.outputs.image_filenames == sorted(loaded.outputs.image_filenames)
    by_file = opened(scene / "transforms.json")
    other = by_file.load(by_file.split("test")[0])
    assert torch.equal(other.cameras.camera_to_worlds, loaded.cameras.camera_to_worlds)


def test_real_captures_open_through_their_dataparsers():
    fox = opened(need_shared("data/fox"))
    loaded = fox.load(fox.split("test")[0])
    assert loaded.num_frames == 50 and len(loaded.eval_frames) == 5
    assert loaded.cameras.distortion_params.abs().max() > 0.05
    chair = SceneCollection.open(need_shared("data/chair"), BlenderDataParserConfig())
    loaded = chair.load(chair.split("test")[0])
    assert (len(loaded.train_frames), len(loaded.eval_frames)) == (100, 40)


def test_pixels_and_cameras_of_a_sample_belong_together(scene):
    """What the sample's intrinsics and the scene's poses see is what the sample shows."""
    loaded = opened(scene)
    frames = loaded.load(loaded.split("train")[0])
    sample = read_sample(frames, FrameChoice((0, 1, 2), (3,)), IMAGES)
    views = Sample.collate([sample]).view_set("cpu").context
    intrinsics = sample.intrinsics[:3]
    # The dataparser moves the world, so the poses are those of the file.
    meta = json.loads((scene / "transforms.json").read_text())
    poses = torch.tensor([meta["frames"][i]["transform_matrix"] for i in range(3)])
    rendered = torch.from_numpy(render_spheres(poses, intrinsics, 16, 16, seed=0)).float() / 255
    composited = rendered[..., :3] * rendered[..., 3:] + 1 - rendered[..., 3:]
    difference = (composited - views.rgb[0]).abs().mean(dim=-1)
    assert difference.median() < 0.01 and difference.mean() < 0.08  # resampling blurs edges only
    shifted = (composited - views.rgb[0].roll(2, dims=2)).abs().mean()
    assert shifted > 2 * difference.mean()


def stand_still(meta: dict) -> None:
    for frame in meta["frames"]:
        for axis in range(3):
            frame["transform_matrix"][axis][3] = 0.1 + axis


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("frames"), "cannot be used"),
        (lambda s: s.update(frames=[]), "cannot be used"),
        (lambda s: s["frames"][2].update(transform_matrix=[[float("nan")] * 4] * 4), "pose that is not finite"),
        (stand_still, "all its camera centres are equal"),
        (lambda s: s.update(fl_x=0), r"focal lengths \[0.0, .*expected positive"),
    ],
    ids=["no frames key", "no frames", "NaN pose", "no baseline", "zero focal length"],
)
def test_bad_scenes_are_named(tmp_path, spoil, message):
    write_scene(tmp_path / "spoilt")
    edit_json(tmp_path / "spoilt" / "transforms.json", spoil)
    scenes = opened(tmp_path / "spoilt")
    with pytest.raises(DataError, match=rf"scene spoilt \(.*{message}"):
        scenes.load(scenes.entries[0])


def test_missing_data_and_bad_scene_lists_are_refused(tmp_path):
    with pytest.raises(DataError, match="--data .*nowhere does not exist"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found 0 scenes in it; expected a scene"):
        opened(tmp_path / "empty")
    for content, message in (
        ("{", "is not a scene list"),
        ('{"scenes": [{"name": "a"}]}', "KeyError: 'path'"),
        ('{"scenes": []}', "lists no scenes"),
        (json.dumps({"scenes": [{"name": "a", "path": "a", "split": "train"}] * 2}), "lists scenes twice: a"),
    ):
        (tmp_path / "scenes.json").write_text(content)
        with pytest.raises(DataError, match=message):
            opened(tmp_path)


# Training samples


def test_samples_depend_on_seed_and_number_alone(collection):
    scenes = opened(collection)
    first, second = training_samples(scenes), training_samples(opened(collection))
    backwards = {k: second[k] for k in (9, 4, 0)}
    for k, sample in backwards.items():
        assert torch.equal(first[k].rgb, sample.rgb) and torch.equal(first[k].camera_to_worlds, sample.camera_to_worlds)
    assert not torch.equal(first[0].camera_to_worlds, training_samples(scenes, seed=1)[0].camera_to_worlds)


def test_every_epoch_shows_every_training_scene_once(collection):
    samples = training_samples(opened(collection))
    epochs = [[samples._scene_in_epoch(k) for k in range(4 * e, 4 * e + 4)] for e in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_ranks_take_disjoint_samples_and_resume_continues():
    ranks = [iter(StepBatches(0, 3, rank, 2)) for rank in (0, 1)]
    batches = [[next(rank) for _ in range(4)] for rank in ranks]
    seen = sorted(k for rank in batches for batch in rank for k in batch)
    assert seen == list(range(24))
    assert next(iter(StepBatches(3, 3, 1, 2))) == batches[1][3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_of_two_ranks_show_every_scene_once_an_epoch_and_resume(collection, num_workers):
    """The very batches that training gets, whoever decodes them, and from any step on."""
    samples = training_samples(opened(collection))

    def batches(rank: int, first_step: int, count: int) -> list[torch.Tensor]:
        loader = training_batches(samples, StepBatches(first_step, 1, rank, world_size=2), num_workers, pin=False)
        return [sample.rgb for sample, _ in zip(loader, range(count))]

    ranks = [batches(rank, 0, 12) for rank in (0, 1)]  # more than a worker has buffers
    scenes = [samples.entries[samples._scene_in_epoch(k)].name for k in range(8)]
    assert sorted(scenes[:4]) == sorted(scenes[4:]) == [f"scene_{i}" for i in range(4)]
    for step in range(12):
        assert not torch.equal(ranks[0][step], ranks[1][step])
        for rank in (0, 1):
            assert torch.equal(ranks[rank][step][0], samples[2 * step + rank].rgb)
    assert torch.equal(batches(1, 3, 1)[0], ranks[1][3])


def test_the_number_of_context_views_is_drawn_once_a_step(collection):
    samples = training_samples(opened(collection), context=(1, 4))
    counts = [samples[k].num_context_views for k in range(40)]
    assert counts[::2] == counts[1::2] and set(counts) == {1, 2, 3, 4}
    assert {samples[k].rgb.shape[0] - counts[k] for k in range(8)} == {2}


def test_parsed_scenes_are_kept_within_bounds(collection, monkeypatch):
    monkeypatch.setattr(scenes_module, "MAX_PARSED_FRAMES", 20)
    scenes = opened(collection)
    for entry in (*scenes.entries, *scenes.entries):
        assert scenes.load(entry).name == entry.name
        assert sum(scene.num_frames for scene in scenes._parsed.values()) == scenes._parsed_frames <= 20
    assert list(scenes._parsed) == ["scene_5", "scene_6"]


@pytest.mark.parametrize("kind", ["scenes.json", "chunks"])
def test_large_collections_open_without_looking_at_their_scenes(tmp_path, kind):
    """No file of any scene exists, so none can have been opened."""
    names = [f"{i:016x}" for i in range(70_000)]
    if kind == "chunks":
        for split, part in (("train", names[:60_000]), ("test", names[60_000:])):
            (tmp_path / split).mkdir()
            (tmp_path / split / "000000.torch").touch()
            (tmp_path / split / "index.json").write_text(json.dumps({name: f"{name[:12]}.torch" for name in part}))
    else:
        listed = [{"name": n, "path": n, "split": "train" if i < 60_000 else "test"} for i, n in enumerate(names)]
        (tmp_path / "scenes.json").write_text(json.dumps({"scenes": listed}))
    scenes = opened(tmp_path)
    assert len(scenes.split("test")) == 10_000 and len(scenes.split("train")) + len(scenes.split("val")) == 60_000
    with pytest.raises(DataError, match="cannot be used"):
        scenes.load(scenes.entries[0])


def test_unreadable_scenes_are_skipped_and_reported(tmp_path):
    write_collection(tmp_path, "train train train train val test")
    for image in (tmp_path / "scene_1" / "images").iterdir():
        image.write_bytes(b"not an image")
    samples = training_samples(opened(tmp_path))
    taken = [samples[k] for k in range(8)]
    failures = [failure for sample in taken for failure in sample.failures]
    assert len(failures) >= 2 and all("scene_1" in failure and "cannot be read" in failure for failure in failures)
    assert all(sample.rgb.shape == (4, 16, 16, 3) for sample in taken)
    shutil.rmtree(tmp_path / "scene_1" / "images")
    assert any(
        "does not exist" in failure for k in range(8) for failure in training_samples(opened(tmp_path))[k].failures
    )


def test_training_stops_where_no_scene_can_be_used(tmp_path):
    write_collection(tmp_path, "train train val test", num_frames=3)
    samples = training_samples(opened(tmp_path))
    with pytest.raises(DataError, match=f"{MAX_ATTEMPTS} scenes in a row could not be used; the last: scene .* has 3"):
        samples[0]


def write_colmap_scene(folder: Path, num_frames: int = 8) -> Path:
    """The spheres as COLMAP's text model: world-to-camera quaternions and translations, OpenCV; without points, and
    images numbered backwards, as they need not be in the order of their names."""
    from viser.transforms import SO3

    write_scene(folder, num_frames=num_frames)
    meta = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").unlink()
    model = folder / "colmap" / "sparse" / "0"
    model.mkdir(parents=True)
    size = f"{meta['w']} {meta['h']} {meta['fl_x']} {meta['fl_y']} {meta['cx']} {meta['cy']}"
    (model / "cameras.txt").write_text(f"1 PINHOLE {size}\n")
    lines = []
    for i, frame in enumerate(meta["frames"]):
        world_to_camera = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]))
        pose = [*SO3.from_matrix(world_to_camera[:3, :3]).wxyz, *world_to_camera[:3, 3]]
        lines += [f"{num_frames - i} {' '.join(map(str, pose))} 1 {Path(frame['file_path']).name}", "0 0 -1"]
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_colmap_scenes_open_through_their_dataparser(tmp_path):
    folder = write_colmap_scene(tmp_path / "capture")
    scenes = SceneCollection.open(folder, ColmapDataParserConfig())
    scene = scenes.load(scenes.entries[0])
    assert scene.num_frames == 8 and scene.frame_names == [f"{i:03d}" for i in range(8)]
    # Every eighth of COLMAP's numbers.
    assert scene.eval_frames == (7,) and scene.train_frames == tuple(range(7))
    for other in ("b", "c"):
        write_colmap_scene(tmp_path / "many" / other)
    shutil.copytree(folder, tmp_path / "many" / "a")
    collection = SceneCollection.open(tmp_path / "many", ColmapDataParserConfig())
    whole = collection.load(next(entry for entry in collection.entries if entry.name == "a"))
    assert whole.frame_names == scene.frame_names
    assert torch.allclose(whole.cameras.camera_to_worlds, scene.cameras.camera_to_worlds, atol=1e-6)
    write_scene(tmp_path / "plain")
    plain = opened(tmp_path / "plain").load(opened(tmp_path / "plain").entries[0])
    # The same cameras up to the dataparsers' similarity transforms, which the canonical frame cancels.
    views = [views_from_cameras(s.cropped_cameras(range(8), IMAGES), 1) for s in (scene, plain)]
    canonical = [CanonicalFrame.estimate(v.camera_to_world).apply(v.camera_to_world) for v in views]
    assert torch.allclose(canonical[0], canonical[1], atol=1e-4)
    assert torch.allclose(views[0].directions, views[1].directions, atol=1e-6)


def test_captures_that_list_train_and_val_alone_open(tmp_path):
    folder = write_scene(tmp_path / "capture")
    names = [f"images/{i:03d}.png" for i in range(8)]
    edit_json(folder / "transforms.json", lambda m: m.update(train_filenames=names[:5], val_filenames=names[5:]))
    scene = opened(folder).load(opened(folder).entries[0])
    assert scene.train_frames == (0, 1, 2, 3, 4) and scene.eval_frames == (5, 6, 7)


def test_frames_of_one_name_in_several_folders_are_told_apart(tmp_path):
    folder = write_scene(tmp_path / "rig", num_frames=4)
    for camera, numbers in (("left", (0, 1)), ("right", (2, 3))):
        (folder / camera).mkdir()
        for number in numbers:
            (folder / f"images/{number:03d}.png").rename(folder / camera / f"{number % 2}.png")

    def move(meta: dict) -> None:
        for number, frame in enumerate(meta["frames"]):
            frame["file_path"] = f"{('left', 'right')[number // 2]}/{number % 2}.png"

    edit_json(folder / "transforms.json", move)
    scene = opened(folder).load(opened(folder).entries[0])
    assert scene.frame_names == ["00000_0", "00001_1", "00002_0", "00003_1"]


def test_cameras_that_nerfstudio_has_no_exact_rays_for_are_refused(tmp_path):
    folder = write_scene(tmp_path / "aria")
    edit_json(folder / "transforms.json", lambda m: m.update(camera_model="FISHEYE624", fisheye_crop_radius=9))
    with pytest.raises(DataError, match=r"camera 0 \(.*000.png\) is of type FISHEYE624; expected one of PERSPECTIVE"):
        opened(folder).load(opened(folder).entries[0])


def test_images_too_large_to_be_opened_are_named(tmp_path, monkeypatch):
    folder = write_scene(tmp_path / "large")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="000.png cannot be read: .*exceeds limit"):
        read_image(folder / "images/000.png", (20, 26), IMAGES)
