"""The method file for NerfBaselines, with that package where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_poses, render_spheres

RELEASE = Path(__file__).parents[2] / "scripts" / "release"
SIZE = 40, 60
"""Height and width."""


@pytest.fixture(scope="module")
def method_class():
    pytest.importorskip("nerfbaselines")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RELEASE))
        patch.setenv("NERFBASELINES_REGISTER", str(RELEASE / "efficient_lvsm_spec.py"))
        from nerfbaselines import build_method_class, get_method_spec

        with build_method_class(get_method_spec("efficient-lvsm"), backend="python") as found:
            yield found


def dataset(count: int = 6):
    from nerfbaselines import new_cameras, new_dataset

    height, width = SIZE
    poses = random_poses(count, torch.Generator().manual_seed(0))
    intrinsics = torch.tensor([60.0, 60.0, width / 2, height / 2])
    images = render_spheres(poses, intrinsics, height, width, seed=0)
    cameras = new_cameras(
        poses=poses[:, :3].numpy() * np.array([1, -1, -1, 1], np.float32),
        intrinsics=intrinsics.expand(count, 4).numpy(),
        camera_models=np.zeros(count, np.int32),
        image_sizes=np.tile(np.array([width, height]), (count, 1)),
    )
    names = [f"/data/{i}.png" for i in range(count)]
    return new_dataset(cameras=cameras, image_paths=names, images=list(images)), poses


def test_it_renders_what_the_network_renders_and_survives_saving(method_class, tmp_path):
    from nerfbaselines import Method
    from nerfstudio.cameras.cameras import Cameras

    from elvsm_nerfstudio.cameras import views_from_cameras

    data, poses = dataset()
    method = method_class(train_dataset=data, config_overrides={"image_size": "32", "num_context_views": "3"})
    assert isinstance(method, Method) and method.train_iteration(0) == {}
    assert method.memory.num_views == 3 and method.context["images"].shape == (3, 32, 32, 3)
    color = method.render(data["cameras"][4])["color"]
    assert color.shape == (*SIZE, 3) and color.dtype == np.float32

    # The same camera by nerfstudio's own: 32 x 48 pixels, whose middle the network was given.
    camera = Cameras(poses[4:5, :3], 48.0, 48.0, 24.0, 16.0, 48, 32)
    with torch.no_grad():
        rgb = method.network.decode(method.memory, views_from_cameras(camera, 8))[0, 0]
    small = torch.nn.functional.interpolate(
        torch.from_numpy(color).permute(2, 0, 1)[None], (32, 48), mode="bilinear", antialias=True
    )
    assert (small[0].permute(1, 2, 0) - rgb).abs().mean() < 0.02
    assert rgb.std() > 0.05  # or this would say nothing

    method.save(str(tmp_path))
    again = method_class(checkpoint=str(tmp_path)).render(data["cameras"][4])["color"]
    np.testing.assert_allclose(again, color, atol=1e-5)


def test_unknown_options_are_refused(method_class):
    with pytest.raises(ValueError, match=r"found options \['size'\]; expected some of \['weights'"):
        method_class(train_dataset=dataset()[0], config_overrides={"size": 3})
