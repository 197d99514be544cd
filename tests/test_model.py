"""The nerfstudio model and pipeline, in process."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import need_shared, tiny_pipeline, write_collection, write_scene
from nerfstudio.cameras.cameras import Cameras, CameraType
from PIL import Image

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data import scene as scene_module
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.evaluation.evaluator import Evaluator, configured_protocol
from elvsm_nerfstudio.evaluation.scored_network import ScoredNetwork
from elvsm_nerfstudio.nn.network import autocast_dtype


@pytest.fixture(scope="module")
def pipeline(collection):
    return tiny_pipeline(collection)


def camera_of(pipeline, height: int, width: int, **changes) -> Cameras:
    poses = pipeline.datamanager.eval_dataset.cameras.camera_to_worlds[:1]
    return Cameras(poses, fx=40.0, fy=40.0, cx=20.0, cy=24.0, height=height, width=width, **changes)


def test_any_size_is_rendered_as_the_crop_of_the_padded_one(pipeline):
    pipeline.model.config.render_size = "native"
    odd = pipeline.model.get_outputs_for_camera(camera_of(pipeline, 41, 53))["rgb"]
    whole = pipeline.model.get_outputs_for_camera(camera_of(pipeline, 48, 56))["rgb"]
    assert odd.shape == (41, 53, 3)
    assert torch.equal(odd, whole[:41, :53])
    assert odd.std() > 1e-3


def test_frames_are_computed_no_finer_than_the_network_knows(pipeline, capsys):
    model = pipeline.model
    tokens = []
    hook = model.network.target_tokenizer.register_forward_hook(lambda *call: tokens.append(call[2].shape[2]))
    # Context images are 16 pixels high with a focal length of 25; 40 for 48 pixels would be 25 for 30.
    camera = camera_of(pipeline, 48, 56)
    for size, computed in (("trained", (30, 35)), (32, (48, 56)), (8, (15, 18)), ("native", (48, 56))):
        model.config.render_size = size
        rgb = model.get_outputs_for_camera(camera)["rgb"]
        assert rgb.shape == (48, 56, 3) and rgb.std() > 1e-3
        assert tokens.pop() == -(-computed[0] // 8) * -(-computed[1] // 8), size
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Frames of 56x48 are computed at 35x30 and enlarged") == 1
    # Frames of the context's height are whole, whatever their lens: those are what evaluation compares.
    model.config.render_size = "trained"
    long = Cameras(camera.camera_to_worlds, fx=90.0, fy=90.0, cx=12.0, cy=8.0, height=16, width=24)
    assert model.get_outputs_for_camera(long)["rgb"].shape == (16, 24, 3) and tokens == [2 * 3]
    hook.remove()


def test_a_camera_without_batch_and_other_lenses_render(pipeline):
    single = camera_of(pipeline, 16, 16)[0]
    assert single.shape == ()
    assert pipeline.model.get_outputs_for_camera(camera=single, obb_box=None)["rgb"].shape == (16, 16, 3)
    fisheye = camera_of(pipeline, 16, 24, camera_type=CameraType.FISHEYE, distortion_params=torch.zeros(6))
    assert pipeline.model.get_outputs_for_camera(fisheye)["rgb"].isfinite().all()


@pytest.mark.parametrize("nearest_views", [None, 1])
def test_frames_rendered_in_one_call_are_those_rendered_one_by_one(pipeline, monkeypatch, nearest_views):
    model = pipeline.model
    monkeypatch.setattr(model.config, "nearest_views", nearest_views)
    poses = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[[0, 1, 0]]
    cameras = Cameras(poses, 40.0, 40.0, torch.tensor([[20.0], [20], [31]]), 24.0, height=21, width=30)
    together = model.render_frames(model.memory(), cameras)
    assert together.shape == (3, 21, 30, 3) and (together[0] - together[2]).abs().max() > 1e-3
    for index, frame in enumerate(together):
        assert torch.allclose(frame, model.render(model.memory(), cameras[index])["rgb"], atol=1e-6)


def test_frames_are_timed_by_the_call(pipeline, monkeypatch):
    model, memory = pipeline.model, pipeline.model.memory()
    poses = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[[0, 1, 0, 1, 1]]
    cameras = Cameras(poses, 40.0, 40.0, 20.0, 24.0, height=21, width=30)
    expected = [rgb for rgb, _ in model.timed_frames(memory, cameras)]
    sizes, calls, render = [], [], model.render_frames
    monkeypatch.setattr(model, "frames_per_call", lambda *size: sizes.append(size) or 2)
    monkeypatch.setattr(model, "render_frames", lambda m, c: calls.append(len(c)) or render(m, c))
    frames, times = zip(*model.timed_frames(memory, cameras))
    assert set(sizes) == {(21, 30)} and calls == [2, 2, 1] and min(times) > 0
    assert times[0] == times[1] and times[2] == times[3] and times[0] != times[2]
    torch.testing.assert_close(frames, tuple(expected), atol=1e-6, rtol=0)
    assert list(model.timed_frames(memory, cameras[:0])) == []


def test_an_evaluation_with_several_frames_a_call_gives_the_same_scores(pipeline, monkeypatch):
    evaluator = Evaluator(
        ScoredNetwork(pipeline.model), pipeline.datamanager, configured_protocol(pipeline.datamanager)
    )
    expected = evaluator.run(None, get_std=False)
    monkeypatch.setattr(pipeline.model, "frames_per_call", lambda height, width: 2)
    calls, render = [], pipeline.model.render_frames
    monkeypatch.setattr(pipeline.model, "render_frames", lambda m, c: calls.append(len(c)) or render(m, c))
    found = evaluator.run(None, get_std=False)
    assert expected.timing["frames_per_call"] == 1 and found.timing["frames_per_call"] == 2
    assert set(calls) == {1, 2} and [row["image"] for row in found.rows] == [row["image"] for row in expected.rows]
    for mine, theirs in zip(found.rows, expected.rows):
        assert mine["psnr"] == pytest.approx(theirs["psnr"], abs=1e-4)


def test_context_is_encoded_once_and_again_when_weights_change(pipeline):
    model = pipeline.model
    memory = model.memory()
    assert model.memory() is memory
    before = model.get_outputs_for_camera(camera_of(pipeline, 16, 16))["rgb"]
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-2)
    views = pipeline.datamanager.evaluation_scene(pipeline.datamanager.eval_entries[0]).views
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.get_outputs(views)["rgb"].sum().backward()
    optimizer.step()
    assert model.memory() is not memory
    assert not torch.equal(model.get_outputs_for_camera(camera_of(pipeline, 16, 16))["rgb"], before)
    model.load_state_dict(state)
    assert torch.equal(model.get_outputs_for_camera(camera_of(pipeline, 16, 16))["rgb"], before)


def test_context_is_not_in_the_state_dict_and_is_needed(pipeline):
    names = list(pipeline.state_dict())
    assert all(name.startswith("_model.network.") or name == "_model.device_indicator_param" for name in names)
    context, pipeline.model._context = pipeline.model._context, None
    with pytest.raises(RuntimeError, match="no context views: call set_context"):
        pipeline.model.memory()
    pipeline.model._context = context


def test_depth_is_there_for_the_viewer_only(pipeline):
    outputs = pipeline.model.get_outputs_for_camera(camera_of(pipeline, 16, 16))
    assert list(outputs) == ["rgb"] and outputs["depth"].shape == outputs["accumulation"].shape == (16, 16, 1)
    assert pipeline.model.get_rgba_image(outputs).shape == (16, 16, 4)
    with pytest.raises(KeyError):
        outputs["normals"]


def test_inference_uses_the_resolution_and_context_of_test(collection):
    test, inference = tiny_pipeline(collection, "test"), tiny_pipeline(collection, "inference")
    assert torch.equal(test.model._context.views.rgb, inference.model._context.views.rgb)
    camera = camera_of(test, 16, 16)
    assert torch.equal(
        test.model.get_outputs_for_camera(camera)["rgb"], inference.model.get_outputs_for_camera(camera)["rgb"]
    )


def test_context_target_frame_is_the_papers_protocol(collection):
    pipeline = tiny_pipeline(collection)
    views = pipeline.datamanager.evaluation_scene(pipeline.datamanager.eval_entries[0]).views
    pipeline.model.config = replace(pipeline.model.config, canonical_frame="context+target")
    centres = torch.cat([v.camera_to_world[:, :, :3, 3] for v in (views.context, views.target)], dim=1)
    assert torch.allclose(pipeline.model.frame_of(views).centre, centres.mean(dim=1), atol=1e-6)
    pipeline.model.config = replace(pipeline.model.config, canonical_frame="context")
    assert torch.allclose(
        pipeline.model.frame_of(views).centre, views.context.camera_to_world[:, :, :3, 3].mean(dim=1), atol=1e-6
    )


def test_evaluation_walks_every_scene_of_the_index(pipeline, tmp_path):
    averages = pipeline.get_average_eval_image_metrics(output_path=tmp_path, get_std=True)
    report = json.loads((tmp_path / "metrics.images.json").read_text())
    rows = report["images"]
    assert [(row["scene"], row["image"]) for row in rows] == [
        (scene, image) for scene in ("scene_5", "scene_6") for image in ("001", "005", "006")
    ]
    assert averages["num_images"] == 6 and averages["num_scenes"] == 2
    assert averages["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
    assert averages["psnr_std"] == pytest.approx(np.std([row["psnr"] for row in rows]))
    assert set(report["timing"]["by_context_views"]["2"]["encode_ms"]) == {"median", "min", "max"}
    assert np.array(Image.open(tmp_path / "scene_5.png")).shape == (3 * 16 + 8, 3 * 16 + 8, 3)
    saved = np.array(Image.open(tmp_path / "predictions/scene_6/005.png"), dtype=np.float32) / 255
    scene = pipeline.datamanager.evaluation_scene(pipeline.datamanager.eval_entries[1])
    error = ((saved - scene.views.target.rgb[0, 1].numpy()) ** 2).mean()
    assert -10 * np.log10(error) == pytest.approx(rows[4]["psnr"], abs=0.05)


def test_evaluation_leaves_the_shown_context_and_the_mode_alone(pipeline):
    context = pipeline.model._context
    pipeline.train()
    metrics, images = pipeline.get_eval_image_metrics_and_images(step=3)
    _, losses, _ = pipeline.get_eval_loss_dict(step=1)
    assert pipeline.model.training and pipeline.model._context is context
    assert metrics["num_rays"] == 256 and images["views"].shape[-1] == 3 and losses["mse"] > 0
    pipeline.eval()


def test_checkpoint_of_another_architecture_is_refused(pipeline, collection):
    state = dict(pipeline.state_dict())
    state["_model.network.head.weight"] = torch.zeros(1, 1)
    del state["_model.network.context_tokenizer.weight"]
    with pytest.raises(
        ValueError, match=r"another architecture[\s\S]*missing network.context_tokenizer[\s\S]*found shape"
    ):
        pipeline.load_pipeline(state, step=1)


def test_data_parallel_checkpoints_load(pipeline):
    state = {name.replace("_model.", "_model.module."): value for name, value in pipeline.state_dict().items()}
    pipeline.load_pipeline(state, step=1)


def test_image_size_must_fit_the_patches(collection):
    with pytest.raises(ValueError, match="image-size 20 16: expected multiples of the patch size 8"):
        tiny_pipeline(collection, image_size=(20, 16))


def test_training_reports_val_scenes_that_cannot_be_used_and_goes_on(tmp_path):
    write_collection(tmp_path, "train train val val val test", num_frames=6)
    pipeline = tiny_pipeline(tmp_path, "val")
    images = sorted((tmp_path / "scene_3" / "images").iterdir())
    for image in images:
        image.write_bytes(image.read_bytes()[:60])
    whole = pipeline.get_average_eval_image_metrics()
    assert whole["num_scenes"] == 2 and any("scene_3" in reason for reason in pipeline.datamanager.skipped_scenes)
    seen = {pipeline.datamanager.scene_of_step(step).name for step in range(0, 10_000, 500)}
    assert seen == {"scene_2", "scene_4"}
    for image in [*(tmp_path / "scene_2/images").iterdir(), *(tmp_path / "scene_4/images").iterdir()]:
        image.unlink()
    for evaluate in (pipeline.get_average_eval_image_metrics, lambda: pipeline.get_eval_loss_dict(step=500)):
        with pytest.raises(DataError, match="can be used; the reasons are above"):
            evaluate()


def test_evaluation_stops_at_an_unreadable_image(tmp_path):
    write_collection(tmp_path, "train val test test", num_frames=6)
    pipeline = tiny_pipeline(tmp_path)
    for image in (tmp_path / "scene_3" / "images").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=r"scene_3/images/.*png cannot be read"):
        pipeline.get_average_eval_image_metrics()


def test_single_scene_with_too_few_frames_to_train_on(tmp_path):
    data = write_scene(tmp_path / "few", num_frames=10)
    pipeline = tiny_pipeline(data, "val", num_target_views=8)
    with pytest.raises(
        DataError,
        match=r"scene few \(.*\) has 9 frames; expected at least 10, for 2 context and 8 target.*num-target-views",
    ):
        pipeline.datamanager.next_train(0)


@pytest.mark.parametrize("num_frames, num_context", [(2, 2), (5, 4), (12, 4)])
def test_a_few_photos_can_be_looked_at_but_not_scored(tmp_path, num_frames, num_context):
    """Of up to 9 nerfstudio's dataparser holds out none, and there may be fewer than the context views asked for."""
    data = write_scene(tmp_path / "few", num_frames=num_frames)
    pipeline = tiny_pipeline(data, "inference", num_context_views=4)
    assert len(pipeline.datamanager.train_dataset) == num_context
    camera = pipeline.datamanager.eval_dataset.cameras[:1]
    assert pipeline.model.get_outputs_for_camera(camera)["rgb"].shape == (16, 16, 3)
    if num_frames > 9:
        assert pipeline.get_average_eval_image_metrics()["num_images"] == 1
        return
    message = "no frame held out as target: .*--eval-mode interval.*elvsm run --from-run CONFIG --train-split-fraction"
    context = f"few has {num_frames} frames for context.*expected at least 5.* it also has " if num_frames < 4 else ""
    with pytest.raises(DataError, match=context + message):
        pipeline.get_average_eval_image_metrics()
    with pytest.raises(DataError, match=message):
        tiny_pipeline(data, "val")


def test_targets_of_an_index_are_not_trained_on(tmp_path):
    data = write_scene(tmp_path / "capture", num_frames=12)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"capture": {"context": [0, 5], "target": [3, 4]}}))
    datamanager = tiny_pipeline(data, "val", evaluation_index=index).datamanager
    scene = datamanager.collection.load(datamanager.shown)
    assert {3, 4} <= set(scene.eval_frames) and not {3, 4} & set(scene.train_frames)
    assert len(scene.train_frames) == 12 - len(scene.eval_frames) and len(scene.train_frames) >= 9
    assert datamanager.shown_scene().target_names == ("003", "004")


def test_ns_render_shows_the_scene_whose_context_is_held(collection):
    """It makes a data manager of another split from the same config, for the cameras."""
    pipeline = tiny_pipeline(collection, "inference")
    other = pipeline.config.datamanager.setup(test_mode="val", device="cpu")
    assert pipeline.datamanager.shown.name == other.shown.name == "scene_5"
    assert other.shown.split == "test"


def test_a_start_crops_the_cameras_of_a_scene_once(scene, monkeypatch):
    crop, cropped = scene_module.resize_and_crop_intrinsics, []

    def counted(intrinsics, *rest):
        cropped.append(len(intrinsics))
        return crop(intrinsics, *rest)

    monkeypatch.setattr(scene_module, "resize_and_crop_intrinsics", counted)
    pipeline = tiny_pipeline(scene, "val")
    pipeline.datamanager.next_train(0)
    pipeline.datamanager.next_eval(0)
    assert cropped == [12]


def test_an_unknown_scene_to_show_is_refused(collection):
    with pytest.raises(DataError, match="scene nowhere: .*has no such scene; it has scene_5"):
        tiny_pipeline(collection, scene="nowhere")


def test_training_batches_resume_where_they_stopped(collection):
    straight, resumed = tiny_pipeline(collection, "val"), tiny_pipeline(collection, "val")
    batches = [straight.datamanager.next_train(step)[0] for step in range(6)]
    for step in (4, 5):
        views = resumed.datamanager.next_train(step)[0]
        assert torch.equal(views.target.rgb, batches[step].target.rgb)
        assert torch.equal(views.context.camera_to_world, batches[step].context.camera_to_world)


def test_real_photos_keep_their_distorted_rays():
    pipeline = tiny_pipeline(need_shared("data/fox"), num_context_views=3)
    context = pipeline.model._context.views
    dataset = pipeline.datamanager.train_dataset
    expected = views_from_cameras(dataset.cameras, patch_size=1).directions
    assert torch.allclose(context.directions, expected, atol=1e-6)
    dataset.cameras.distortion_params = None
    assert (views_from_cameras(dataset.cameras, 1).directions - expected).abs().max() > 1e-3
    shown = {Path(name) for name in dataset.image_filenames}
    assert not shown & set(pipeline.datamanager.eval_dataset.image_filenames)


def test_precision_follows_the_device():
    assert autocast_dtype("fp32", torch.device("cpu")) is None
    assert autocast_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    expected = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    assert autocast_dtype("auto", torch.device("cpu")) == expected
