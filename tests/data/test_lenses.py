"""Lens augmentation: windows of pictures, and the cameras that belong to them."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import need_shared, render_spheres, tiny_pipeline, write_scene
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from elvsm_nerfstudio.data import samples as samples_module
from elvsm_nerfstudio.data.images import ImageSpec
from elvsm_nerfstudio.data.lenses import (
    ASPECT_SHARE,
    OWN_ZOOM_SHARE,
    SCENE_SHARE,
    SHIFT,
    VIEW_ZOOM,
    ZOOM,
    Lens,
    draw_lenses,
    other_aspects,
    step_spec,
    window_of,
)
from elvsm_nerfstudio.data.samples import StepBatches, TrainingSamples, read_sample, training_batches
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.data.view_samplers import FrameChoice, RandomViewSampler
from elvsm_nerfstudio.method_configs import efficient_lvsm_tiny

AS_THEY_ARE = NerfstudioDataParserConfig(orientation_method="none", center_method="none", auto_scale_poses=False)


def loaded(path) -> Scene:
    scenes = SceneCollection.open(path, AS_THEY_ARE)
    return scenes.load(scenes.entries[0])


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_windows_and_their_cameras_belong_together(tmp_path, size):
    scene = loaded(write_scene(tmp_path / "spheres", num_frames=4, size=(192, 240), seed=3))
    lenses = [Lens(0.7, (0, 0)), Lens(0.75, (0.15, -0.12)), Lens(1.6, (-0.1, 0.15)), Lens(1.0, (0.03, 0))]
    sample = read_sample(scene, FrameChoice((0, 1), (2, 3)), ImageSpec(size), lenses=lenses)
    poses = torch.eye(4).repeat(4, 1, 1)
    poses[:, :3] = sample.camera_to_worlds
    for i in range(4):
        # Traced at four times the size through the camera that the sample states, and averaged.
        traced = render_spheres(poses[i : i + 1], 4 * sample.intrinsics[i], 4 * size[0], 4 * size[1], seed=3)[0]
        on_white = traced[..., :3] + (255.0 - traced[..., 3:])
        expected = on_white.reshape(size[0], 4, size[1], 4, 3).mean((1, 3))
        found = sample.rgb[i].numpy().astype(float)
        error, beside = np.abs(found - expected).mean(), np.abs(np.roll(found, 1, axis=1) - expected).mean()
        assert error < 2 and beside > 3 * error


def test_photos_have_nothing_beyond_their_border():
    generator = torch.Generator().manual_seed(0)
    lenses = [lens for _ in range(40) for lens in draw_lenses(4, generator) or ()]
    for size in [(32, 32), *other_aspects((64, 64))]:
        for lens in lenses:
            window = window_of(lens, (270, 480), size, cut_out=False)
            assert 0 <= window.left < window.right <= 480 + 1e-9 and 0 <= window.top < window.bottom <= 270 + 1e-9
            assert (window.right - window.left) / (window.bottom - window.top) == pytest.approx(size[1] / size[0])


def test_windows_of_photos_are_read_up_to_the_border(tmp_path):
    photo = write_scene(tmp_path / "opaque", num_frames=4, size=(45, 67))
    for file in (photo / "images").iterdir():
        Image.new("RGB", (67, 45), (10, 20, 30)).save(file)
    lenses = [Lens(0.7, (shift, -shift)) for shift in (-0.15, -0.1, 0.1, 0.15)]
    for size in [(16, 16), *other_aspects((64, 64))]:
        sample = read_sample(loaded(photo), FrameChoice((0, 1), (2, 3)), ImageSpec(size), lenses=lenses)
        assert (sample.rgb == torch.tensor([10, 20, 30])).all()


def test_lenses_cover_their_whole_range():
    generator = torch.Generator().manual_seed(0)
    scenes = [draw_lenses(6, generator) for _ in range(2000)]
    seen = [lenses for lenses in scenes if lenses is not None]
    assert len(seen) / len(scenes) == pytest.approx(SCENE_SHARE, abs=0.03)
    zooms = np.array([[lens.zoom for lens in lenses] for lenses in seen])
    assert ZOOM[0] / VIEW_ZOOM <= zooms.min() < 1.05 * ZOOM[0] / VIEW_ZOOM
    assert 0.95 * ZOOM[1] * VIEW_ZOOM < zooms.max() <= ZOOM[1] * VIEW_ZOOM
    mixed = zooms.max(axis=1) / zooms.min(axis=1) > VIEW_ZOOM**2
    assert 0.7 * OWN_ZOOM_SHARE < mixed.mean() < OWN_ZOOM_SHARE + 0.03
    shifts = np.abs([lens.shift for lenses in seen for lens in lenses])
    assert 0.98 * SHIFT < shifts.max() <= SHIFT
    # A zoom below 1 shows more than the picture.
    assert window_of(Lens(0.5, (0, 0)), (100, 100), (64, 64), cut_out=True) == (-50, -50, 150, 150)


def test_what_is_a_cut_out_is_told_by_the_border(tmp_path):
    assert loaded(write_scene(tmp_path / "spheres")).is_cut_out
    for name, pixels in (("rgb", np.full((20, 26, 3), 9, np.uint8)), ("rgba", np.full((20, 26, 4), 255, np.uint8))):
        opaque = write_scene(tmp_path / name)
        for file in (opaque / "images").iterdir():
            Image.fromarray(pixels).save(file)
        assert not loaded(opaque).is_cut_out
    assert not loaded(need_shared("data/fox")).is_cut_out


def test_steps_have_aspects_of_at_most_as_many_pixels():
    assert other_aspects((64, 64)) == [(56, 72), (72, 56), (48, 80), (80, 48)]
    assert all(h * w <= 256 * 256 and h % 8 == w % 8 == 0 for h, w in other_aspects((256, 256)))
    spec = ImageSpec((64, 64), "black")
    steps = [step_spec(spec, seed=1, step=step) for step in range(1000)]
    assert steps == [step_spec(spec, seed=1, step=step) for step in range(1000)]
    assert np.mean([step != spec for step in steps]) == pytest.approx(ASPECT_SHARE, abs=0.05)
    assert {step.size for step in steps} == {spec.size, *other_aspects(spec.size)}
    assert all(step.background == "black" for step in steps)


def test_workers_and_resumed_runs_see_the_same_lenses(collection):
    scenes = SceneCollection.open(collection, NerfstudioDataParserConfig())
    batches = {}
    for first, workers in ((0, 0), (3, 0), (0, 2)):
        sampler = RandomViewSampler(2, targets_include_context=False)
        samples = TrainingSamples(
            scenes, scenes.split("train"), sampler, ImageSpec((32, 32)), 0, (1, 3), 2, lens_augmentation=True
        )
        loader = training_batches(samples, StepBatches(first, 2, 0, 1), workers, pin=False)
        batches[first, workers] = [next(loader) for _ in range(8)]
    assert len({batch.rgb.shape[2:4] for batch in batches[0, 0]}) > 1
    pairs = [*zip(batches[3, 0], batches[0, 0][3:]), *zip(batches[0, 2], batches[0, 0])]
    for batch, expected in pairs:
        assert torch.equal(batch.rgb, expected.rgb) and torch.equal(batch.cameras, expected.cameras)


def test_what_a_step_has_in_common_is_drawn_once(collection, monkeypatch):
    scenes, steps = SceneCollection.open(collection, NerfstudioDataParserConfig()), []
    monkeypatch.setattr(samples_module, "step_spec", lambda spec, seed, step: steps.append(step) or spec)
    sampler, spec = RandomViewSampler(2, targets_include_context=False), ImageSpec((32, 32))
    samples = TrainingSamples(scenes, scenes.split("train"), sampler, spec, 0, (1, 3), 3, lens_augmentation=True)
    assert samples.__getitems__([3, 4, 5]).rgb.shape[0] == 3 and steps == [1]


def test_evaluation_sees_the_pictures_as_they_were_taken(collection):
    views = []
    for lens_augmentation in (False, True):
        datamanager = tiny_pipeline(collection, lens_augmentation=lens_augmentation).datamanager
        views.append(datamanager.evaluation_scene(datamanager.eval_entries[0]).views.context)
    assert torch.equal(views[0].rgb, views[1].rgb) and torch.equal(views[0].intrinsics, views[1].intrinsics)


def test_training_goes_through_steps_of_all_aspects(collection):
    pipeline = tiny_pipeline(collection, test_mode="val", lens_augmentation=True, image_size=(32, 32)).train()
    shapes = set()
    for step in range(20):
        outputs, losses, _ = pipeline.get_train_loss_dict(step)
        sum(losses.values()).backward()
        shapes.add(tuple(outputs["rgb"].shape[2:4]))
    assert (32, 32) in shapes and len(shapes) > 2
    assert all(p.grad.isfinite().all() for p in pipeline.model.network.parameters())


@pytest.mark.parametrize("kind", [CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR])
def test_shifted_grids_show_the_same_rays(collection, monkeypatch, kind):
    model = tiny_pipeline(collection).model
    memory, sizes = model.memory(), []

    def rays(memory, target, nearest_views):
        sizes.append((target.height, target.width))
        return target.directions / 2 + 0.5

    monkeypatch.setattr(type(model.network), "decode", lambda self, *args: rays(*args))
    camera = Cameras(torch.eye(4)[None, :3], 30.0, 31.0, 13.0, 9.5, 26, 20, torch.zeros(1, 6), kind)
    expected = model.render(memory, camera)["rgb"]
    model.config.shifted_grids = 4
    shown = model.render(memory, camera)["rgb"]
    assert shown.shape == (20, 26, 3) and torch.allclose(shown, expected, atol=1e-6)
    grids = [(24, 32)] if kind == CameraType.EQUIRECTANGULAR else [(24, 32)] * 4
    assert sizes == [(24, 32), *grids]


def test_patches_that_do_not_divide_the_sides_of_other_aspects_are_refused(collection):
    config = deepcopy(efficient_lvsm_tiny.config.pipeline)
    config.datamanager.data, config.datamanager.lens_augmentation = collection, True
    config.model.network.patch_size = 16
    with pytest.raises(ValueError, match=r"lens-augmentation True.*found patch size 16.*expected a divisor of 8"):
        config.setup(device="cpu", test_mode="test")
