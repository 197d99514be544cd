"""Scenes of random size in training."""

import pytest
import torch
from conftest import make_views, tiny_pipeline

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.model import EfficientLVSMModelConfig
from elvsm_nerfstudio.training.augmentation import scaled_at_random


def test_each_scenes_camera_centres_are_scaled_and_nothing_else():
    poses = make_views(3, 4, 16, 16).camera_to_world
    frame = CanonicalFrame.estimate(poses)
    scaled = scaled_at_random(frame, (0.5, 3.0), torch.Generator().manual_seed(0))
    before, after = frame.apply(poses), scaled.apply(poses)
    assert torch.equal(before[..., :3, :3], after[..., :3, :3])
    factors = after[..., :3, 3] / before[..., :3, 3]
    assert torch.allclose(factors, factors[:, :1, :1].expand_as(factors), rtol=1e-4)
    first = factors[:, 0, 0]
    assert ((0.5 <= first) & (first <= 3)).all() and (first - first[0]).abs()[1:].min() > 1e-2


def test_factors_are_uniform_in_their_logarithm():
    frame = CanonicalFrame(torch.eye(3).expand(4000, 3, 3), torch.zeros(4000, 3), torch.ones(4000))
    scaled = scaled_at_random(frame, (0.7, 1.4), torch.Generator().manual_seed(0))
    factors = (1 / scaled.scale).log2()
    low, high = torch.tensor([0.7, 1.4]).log2()
    assert factors.min() >= low - 1e-5 and factors.max() <= high + 1e-5
    quarters = torch.histc(factors, 4, low.item(), high.item())
    assert (quarters - 1000).abs().max() < 120  # about four standard deviations


def test_training_scales_and_evaluation_does_not(collection):
    pipeline = tiny_pipeline(collection, "val")
    model = pipeline.model
    views, _ = pipeline.datamanager.next_train(0)
    plain = model(views)["rgb"]
    model.config.scale_augmentation = (2.0, 2.0)
    assert torch.equal(model(views)["rgb"], plain)
    pipeline.train()
    model.generator = pipeline.datamanager.generator(0)
    scaled = model(views)["rgb"]
    frame = model.frame_of(views)
    twice = CanonicalFrame(frame.axes, frame.centre, frame.scale / 2)
    assert torch.allclose(scaled, model.network(views.context, views.target, twice), atol=1e-6)
    assert (scaled - plain).abs().max() > 1e-3


@pytest.mark.parametrize("bounds", [(1.4, 0.7), (0.0, 1.0)])
def test_bounds_that_make_no_sense_are_refused(bounds):
    config = EfficientLVSMModelConfig(scale_augmentation=bounds)
    config.network = type(config.network)(width=32, num_layers=1, head_dim=16)
    with pytest.raises(ValueError, match="--pipeline.model.scale-augmentation .*expected 0 < smallest <= largest"):
        config.setup(scene_box=None, num_train_data=1)
