import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_views

from elvsm_nerfstudio.evaluation.baselines import copy_nearest
from elvsm_nerfstudio.evaluation.report import sheet, write_image, write_json
from elvsm_nerfstudio.programs import ns_eval_output


def test_copy_nearest_takes_the_nearest_camera():
    context = make_views(2, 4, 8, 8)
    target = context.select([2, 0])
    moved = target.camera_to_world.clone()
    moved[..., 0, 3] += 1e-3
    copied = copy_nearest(context, type(target)(moved, target.directions, target.intrinsics))
    assert torch.equal(copied, context.rgb[:, [2, 0]])


def test_json_is_strict_and_written_whole(tmp_path):
    write_json(tmp_path / "deep/a.json", {"psnr": 1.5})
    assert json.loads((tmp_path / "deep/a.json").read_text()) == {"psnr": 1.5}
    with pytest.raises(ValueError):
        write_json(tmp_path / "deep/a.json", {"psnr": math.nan})
    assert json.loads((tmp_path / "deep/a.json").read_text()) == {"psnr": 1.5}


def test_sheet_puts_rows_below_each_other(tmp_path):
    from PIL import Image

    red, blue = torch.zeros(6, 5, 3), torch.zeros(6, 5, 3)
    red[..., 0], blue[..., 2] = 1, 1
    write_image(tmp_path / "sheet.png", sheet([[red, blue], [blue]]))
    picture = np.array(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (16, 14, 3)
    assert picture[0, 0].tolist() == [255, 0, 0] and picture[0, 13].tolist() == [0, 0, 255]
    assert picture[15, 0].tolist() == [0, 0, 255] and picture[15, 13].tolist() == [255, 255, 255]


def test_ns_eval_tells_where_it_writes(tmp_path, monkeypatch):
    from nerfstudio.scripts import eval as ns_eval

    found = []

    def score(output_path: Path | None, get_std: bool) -> dict[str, float]:
        found.append(ns_eval_output())
        return {"psnr": 1.0}

    config = SimpleNamespace(experiment_name="e", method_name="m")
    pipeline = SimpleNamespace(get_average_eval_image_metrics=score)
    monkeypatch.setattr(ns_eval, "eval_setup", lambda path: (config, pipeline, tmp_path / "step.ckpt", 0))
    ns_eval.ComputePSNR(load_config=tmp_path / "config.yml", output_path=tmp_path / "[a] result.json").main()
    assert found == [tmp_path / "[a] result.json"] and ns_eval_output() is None
