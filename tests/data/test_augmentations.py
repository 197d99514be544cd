"""Scenes mirrored and in other colours."""

import pytest
import torch
from conftest import tiny_pipeline, write_scene
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from elvsm_nerfstudio.cameras import pack_cameras, unpack_cameras, views_from_cameras
from elvsm_nerfstudio.data.augmentations import (
    COLOUR_SHARE,
    MIRROR_SHARE,
    Augmentation,
    Change,
    Colours,
    draw_colours,
    mirrored,
)
from elvsm_nerfstudio.data.images import ImageSpec
from elvsm_nerfstudio.data.lenses import Lens
from elvsm_nerfstudio.data.samples import StepBatches, TrainingSamples, read_sample, training_batches
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.data.view_samplers import FrameChoice, RandomViewSampler

AS_THEY_ARE = NerfstudioDataParserConfig(orientation_method="none", center_method="none", auto_scale_poses=False)
CHOICE = FrameChoice((0, 1), (2, 3))
ALL = Augmentation(mirror=True, colour=True)


def loaded(path):
    scenes = SceneCollection.open(path, AS_THEY_ARE)
    return scenes.load(scenes.entries[0])


def world_directions(cameras: torch.Tensor) -> torch.Tensor:
    """Of each pixel's ray, of unit length."""
    views = views_from_cameras(unpack_cameras(cameras), patch_size=1)
    rotation = views.camera_to_world[0, :, None, None, :3, :3]
    return torch.nn.functional.normalize((rotation @ views.directions[0][..., None])[..., 0], dim=-1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", [CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR])
def test_a_mirrored_camera_has_the_mirrored_rays(kind):
    pose = torch.linalg.qr(torch.randn(3, 3, generator=generator()))[0]
    pose = torch.cat([pose * pose.det(), torch.tensor([[0.3], [-0.5], [2.0]])], dim=1)[None]
    tangential = [0.02, -0.03] if kind == CameraType.PERSPECTIVE else [0.0, 0.0]
    distortion = torch.tensor([[0.1, -0.05, 0.0, 0.0, *tangential]])
    width = 36 if kind == CameraType.EQUIRECTANGULAR else 20
    fx, cx = (18.0, 18.0) if kind == CameraType.EQUIRECTANGULAR else (15.0, 8.5)
    camera = pack_cameras(Cameras(pose, fx, 16.0, cx, 9.5, width, 18, distortion, kind))
    flip = torch.tensor([-1.0, 1.0, 1.0])
    expected = world_directions(camera).flip(-2) * flip
    assert torch.allclose(world_directions(mirrored(camera)), expected, atol=2e-5)
    rotation = mirrored(camera)[:, :12].view(1, 3, 4)[..., :3]
    assert torch.allclose(rotation.det(), torch.ones(1), atol=1e-5)
    assert torch.equal(mirrored(camera)[:, 3:12:4], camera[:, 3:12:4] * flip)
    assert torch.allclose(mirrored(mirrored(camera)), camera)


def test_all_views_of_a_scene_are_mirrored_with_their_lenses(tmp_path):
    scene, spec = loaded(write_scene(tmp_path / "spheres", num_frames=4, size=(48, 64))), ImageSpec((32, 32))
    lenses = [Lens(0.8, (0.1, 0)), Lens(1.3, (-0.1, 0.05)), Lens(1.0, (0, 0)), Lens(1.1, (0.15, 0.1))]
    as_it_is = read_sample(scene, CHOICE, spec, lenses=lenses)
    sample = read_sample(scene, CHOICE, spec, lenses=lenses, change=Change(mirrored=True))
    assert torch.equal(sample.rgb, as_it_is.rgb.flip(-2))
    assert torch.equal(sample.cameras, mirrored(as_it_is.cameras))
    assert (sample.intrinsics[:, 2] + as_it_is.intrinsics[:, 2] == 32).all()


def test_colours_keep_white_and_black(tmp_path):
    scene, spec = loaded(write_scene(tmp_path / "spheres", num_frames=4)), ImageSpec((20, 20))
    as_it_is = read_sample(scene, CHOICE, spec).rgb
    values = torch.arange(256).repeat(3, 1).to(torch.uint8)
    exchanged = read_sample(scene, CHOICE, spec, change=Change(colours=Colours(values, [2, 0, 1]))).rgb
    assert torch.equal(exchanged, as_it_is[..., [2, 0, 1]]) and not torch.equal(exchanged, as_it_is)
    drawn = [draw_colours(generator(seed)) for seed in range(60)]
    assert len({tuple(colours.order) for colours in drawn}) == 6
    for colours in drawn:
        assert (colours.values[:, 0] == 0).all() and (colours.values[:, 255] == 255).all()
        assert (colours.values.int().diff(dim=1) >= 0).all()
    middle = torch.stack([colours.values[:, 128] for colours in drawn])
    assert 105 <= middle.min() < 112 and 142 < middle.max() <= 147  # 255 * (128 / 255) ** 1.25 = 108


def test_each_option_changes_its_share_of_the_scenes_and_draws_nothing_where_it_is_off():
    drawing = generator()
    changes = [ALL.draw(drawing) for _ in range(3000)]
    for found, share in (
        ([change.mirrored for change in changes], MIRROR_SHARE),
        ([change.colours is not None for change in changes], COLOUR_SHARE),
    ):
        assert sum(found) / len(found) == pytest.approx(share, abs=0.04)
    untouched = generator(7)
    assert Augmentation().draw(untouched) == Change()
    assert torch.equal(untouched.get_state(), generator(7).get_state())


def test_workers_see_the_same_changes(collection):
    scenes, batches = SceneCollection.open(collection, NerfstudioDataParserConfig()), {}
    for workers in (0, 2):
        samples = TrainingSamples(
            scenes,
            scenes.split("train"),
            RandomViewSampler(2, targets_include_context=False),
            ImageSpec((32, 32)),
            seed=0,
            num_context_views=(1, 3),
            samples_per_step=2,
            lens_augmentation=True,
            augmentation=ALL,
        )
        loader = training_batches(samples, StepBatches(0, 2, 0, 1), workers, pin=False)
        batches[workers] = [next(loader) for _ in range(6)]
    for batch, expected in zip(batches[2], batches[0]):
        assert torch.equal(batch.rgb, expected.rgb) and torch.equal(batch.cameras, expected.cameras)


@pytest.mark.parametrize("option", ["mirror_augmentation", "colour_augmentation"])
def test_options_change_training_and_not_evaluation(collection, option):
    pipelines = [tiny_pipeline(collection, test_mode="val", **{option: on}) for on in (False, True)]
    evaluated = [p.datamanager.evaluation_scene(p.datamanager.eval_entries[0]).views.context for p in pipelines]
    assert torch.equal(evaluated[0].rgb, evaluated[1].rgb)
    trained = [[p.datamanager.next_train(step)[0].target.rgb for step in range(6)] for p in pipelines]
    assert any(not torch.equal(one, other) for one, other in zip(*trained))
