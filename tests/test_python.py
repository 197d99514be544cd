"""What `from elvsm_nerfstudio import ...` offers, and README's snippet as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_views, write_scene

import elvsm_nerfstudio
from elvsm_nerfstudio import load_network, views_from_arrays, views_from_capture

README = Path(__file__).parents[1] / "README.md"


def test_all_names_are_there_and_others_are_not():
    for name in elvsm_nerfstudio.__all__:
        assert getattr(elvsm_nerfstudio, name).__name__ == name
    assert set(elvsm_nerfstudio.__all__) == set(elvsm_nerfstudio._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'lode_network'"):
        elvsm_nerfstudio.lode_network  # noqa: B018


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch):
    write_scene(tmp_path / "YOUR_CAPTURE", num_frames=12)
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    rgb, memory, network = (names[name] for name in ("rgb", "memory", "network"))
    assert rgb.shape == (1, 128, 128, 3) and 0 <= rgb.min() < rgb.max() <= 1
    assert memory.ids == (1, 2, 3, 4)
    torch.testing.assert_close(network.decode(memory, names["camera"])[0], rgb)


def test_views_of_a_capture_and_of_its_numbers_are_the_same(scene):
    views = views_from_capture(scene, size=(16, 24), frames=(3, 8))
    fx, fy, cx, cy = (views.intrinsics[0] * torch.tensor([24, 16, 24, 16])).double().unbind(-1)
    matrix = np.zeros((2, 3, 3))
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2], matrix[:, 1, 2], matrix[:, 2, 2] = fx, fy, cx, cy, 1
    pixels = (views.rgb[0] * 255).round().byte()
    for intrinsics in (matrix, torch.stack([fx, fy, cx, cy], dim=-1)):
        made = views_from_arrays(views.camera_to_world[0].numpy(), intrinsics, pixels.numpy())
        for name in ("camera_to_world", "directions", "intrinsics", "rgb"):
            torch.testing.assert_close(getattr(made, name), getattr(views, name))
    network = load_network("pretrained")
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        network.encode(views_from_capture(scene, size=(20, 24)))


def test_what_cannot_be_used_is_named(scene):
    with pytest.raises(ValueError, match="found no frames 12, -1; expected some of 0 to 11"):
        views_from_capture(scene, (16, 16), frames=[0, 12, -1])
    views = make_views(1, 2, 16, 16)
    poses, numbers, rgb = views.camera_to_world[0], views.intrinsics[0] * 16, views.rgb[0]
    for given, message in (
        ((poses, numbers[:1], rgb), r"intrinsics are \(1, 4\), expected \[view, 4\]"),
        ((poses[0], numbers[0], rgb[0]), r"camera_to_world is \(4, 4\), expected \[view, 4, 4\]"),
        ((poses, numbers, rgb[:1]), r"images are \(1, 16, 16, 3\); expected \[2, height, width, 3\]"),
        ((poses, numbers, rgb * 255), "images hold .* to 25.*; expected uint8, or colours from 0 to 1"),
        ((poses, numbers), "need a size"),
        ((poses * torch.nan, numbers, rgb), "finite"),
        ((poses @ torch.diag(torch.tensor([1.0, 2, 1, 1])), numbers, rgb), "rotation"),
    ):
        with pytest.raises(ValueError, match=message):
            views_from_arrays(*given)
