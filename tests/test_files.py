"""Files that are there whole or not at all."""

import os
import resource

import pytest
import torch

from elvsm_nerfstudio.evaluation.report import write_image, write_json
from elvsm_nerfstudio.files import whole


def test_a_file_takes_its_place_when_it_is_done(tmp_path):
    path = tmp_path / "new" / "a.json"
    with whole(path, durable=True) as one, whole(path, suffix=".mp4") as other:
        assert one != other and other.suffix == ".mp4" and one.parent == path.parent
        one.write_text("one")
        other.write_text("other")
        assert not path.exists()
    assert path.read_text() == "one" and os.listdir(path.parent) == ["a.json"]


def test_nothing_stays_of_what_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    for fill in (lambda partial: partial.write_text("half"), lambda partial: (partial / "images").mkdir(parents=True)):
        with pytest.raises(KeyboardInterrupt), whole(path) as partial:
            fill(partial)
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == ["a"] and path.read_text() == "before"


def test_nothing_stays_on_a_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        for write in (
            lambda: write_json(tmp_path / "a.json", list(range(10_000))),
            lambda: write_image(tmp_path / "a.png", torch.rand(100, 100, 3)),
        ):
            with pytest.raises(OSError):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
