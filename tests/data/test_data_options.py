"""What the data manager says of options and data that do not fit each other."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline, write_collection, write_scene
from PIL import Image

from elvsm_nerfstudio.data.datamanager import ViewSetDataManagerConfig
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.samples import SharedBuffers


def manager(data, test_mode: str = "test", **options):
    options = {"image_size": (16, 16), "num_context_views": 2, "num_target_views": 2, "num_workers": 0, **options}
    return ViewSetDataManagerConfig(data=data, **options).setup(test_mode=test_mode)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    notes: list[str] = []
    monkeypatch.setattr("elvsm_nerfstudio.data.datamanager.warn", notes.append)
    monkeypatch.setattr("elvsm_nerfstudio.data.datamanager.warn_once", lambda kind, text: notes.append(text))
    return notes


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_context_views=(8, 1)), "num-context-views 8 1: expected one number of at least 1, or the smallest"),
        (dict(num_context_views=0), "num-context-views 0: expected"),
        (dict(num_context_views=(0, 4)), "num-context-views 0 4: expected"),
        (dict(num_target_views=0), "num-target-views 0: expected at least 1"),
        (dict(eval_num_target_views=0), "eval-num-target-views 0: expected at least 1"),
        (dict(scenes_per_batch=0), "scenes-per-batch 0: expected at least 1"),
        (dict(num_workers=-1), "num-workers -1: expected at least 0"),
        (dict(context_frames=()), "context-frames : expected at least one frame"),
    ],
)
def test_numbers_that_cannot_be_are_refused(collection, options, message):
    with pytest.raises(DataError, match=f"--pipeline.datamanager.{message}"):
        manager(collection, **options)


def test_an_index_may_miss_scenes_where_that_is_asked_for(tmp_path, collection, said):
    entry = {"context": [0, 3], "target": [1]}
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"scene_5": entry, "scene_8": entry, "scene_9": entry}))
    with pytest.raises(DataError, match="names 2 scenes .*: scene_8, scene_9. It has views for 1 that .*may-miss"):
        manager(collection, evaluation_index=index)
    pipeline = tiny_pipeline(collection, evaluation_index=index, index_may_miss_scenes=True)
    assert [entry.name for entry in pipeline.datamanager.eval_entries] == ["scene_5"]
    assert any("2 scenes of" in note for note in said)
    pipeline.get_average_eval_image_metrics(output_path=tmp_path / "out")
    details = json.loads((tmp_path / "out/metrics.images.json").read_text())
    assert details["record"]["data"]["scenes_of_the_index_that_are_missing"] == 2
    assert details["context"] == {"scene_5": ["000", "003"]}
    index.write_text(json.dumps({"scene_9": entry}))
    with pytest.raises(DataError, match="It has views for 0"):
        manager(collection, evaluation_index=index, index_may_miss_scenes=True)


def test_a_run_checks_the_index_before_it_is_made(tmp_path, collection):
    from elvsm_nerfstudio.runs import RunOptions, make_run

    index = tmp_path / "index.json"
    index.write_text(json.dumps({name: {"context": [0], "target": [1]} for name in ("scene_5", "scene_9")}))
    options = dict(weights=Path("pretrained"), data=collection, evaluation_index=index, output_dir=tmp_path / "runs")
    with pytest.raises(DataError, match="names 1 scenes .*elvsm run --index-may-miss-scenes"):
        make_run(RunOptions(**options))
    assert not (tmp_path / "runs").exists()


def test_a_collection_without_test_scenes_can_be_looked_at_but_not_scored(tmp_path, said):
    write_collection(tmp_path, "train train val")
    assert manager(tmp_path, "inference").shown.name == "scene_2"
    assert said[0] == f"{tmp_path} has no test split: a scene of another one is shown."
    pipeline = tiny_pipeline(tmp_path, "test")
    with pytest.raises(DataError, match="has no scene in its test split"):
        pipeline.get_average_eval_image_metrics()


def test_the_share_that_is_cropped_is_said(tmp_path, said):
    write_scene(tmp_path / "wide", size=(18, 32))
    manager(tmp_path / "wide", "inference")
    assert said == [
        "Images of 32x18 (scene wide) are cropped to 16x16: 43% of each is cut away. Other aspects: --pipeline."
        "datamanager.image-size HEIGHT WIDTH; docs/data.md says what they cost."
    ]
    said.clear()
    manager(tmp_path / "wide", "inference", image_size=(9, 16))
    assert not said


def test_photos_too_few_for_a_video_name_the_other_sampler(scene):
    with pytest.raises(DataError, match="spheres .*has 11 frames; .*no video .*view-sampler random"):
        manager(scene, "val", view_sampler="bounded-gap").next_train(0)


def test_too_little_shared_memory_names_what_helps(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(DataError, match="16 MiB of shared memory for the images of 4 .*--shm-size.*num-workers 0"):
        SharedBuffers(4, 2**20)


def test_frames_held_out_for_validation_are_in_no_batch(tmp_path):
    folder = write_scene(tmp_path / "scene", num_frames=12)
    meta = json.loads((folder / "transforms.json").read_text())
    for split, frames in (("train", range(6)), ("val", range(6, 9)), ("test", range(9, 12))):
        meta[f"{split}_filenames"] = [f"images/{i:03d}.png" for i in frames]
        for i in frames:
            shade = 10 * i
            Image.new("RGB", (26, 20), (shade, shade, shade)).save(folder / f"images/{i:03d}.png")
    (folder / "transforms.json").write_text(json.dumps(meta))
    training = manager(folder, "val")
    shades = {
        round(float(view.mean()) * 255 / 10) for step in range(20) for view in training.next_train(step)[1]["image"][0]
    }
    assert shades == set(range(6))
    assert training.scene_of_step(0).target_names == ("006", "007")
    assert manager(folder, "test").shown_scene().target_names == ("009", "010", "011")


def test_a_rasterizer_gets_the_lens_of_its_camera_and_a_path_the_size_of_the_photos(tmp_path):
    write_scene(tmp_path / "scene", size=(18, 32))
    cameras = manager(tmp_path / "scene", "inference", image_size=(16, 16)).train_dataset.cameras
    one = cameras[1:2]
    assert torch.equal(one.get_intrinsics_matrices()[0, :2, 2], torch.stack([one.cx[0, 0], one.cy[0, 0]]))
    assert abs(float(one.cx[0, 0]) - 8) > 0.1  # beside the middle
    assert cameras.get_intrinsics_matrices()[:, :2, 2].eq(8).all()
