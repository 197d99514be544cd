"""scripts/benchmarks/rendered_views.py: rows are kept for the weights that they are of."""

import json

import torch

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.weights import save_weights
from scripts.benchmarks.rendered_views import fingerprint, rows_of


def test_rows_of_other_weights_or_steps_are_not_kept(tmp_path):
    config, file = EfficientLVSMConfig(width=64, num_layers=1, head_dim=32), tmp_path / "one.safetensors"
    network = config.build()
    save_weights(file, network.state_dict(), config)
    one = fingerprint(str(file))
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    save_weights(file, network.state_dict(), config)  # another network under the same name
    other = fingerprint(str(file))
    assert one != other and len(one) == 64

    of, rows = {"weights": "one", "weights_sha256": one, "steps": 5}, [{"scene": "cup"}]
    (tmp_path / "rows.json").write_text(json.dumps({**of, "rows": rows}))
    assert rows_of(tmp_path / "rows.json", of) == rows
    for changed in ({"weights_sha256": other}, {"steps": 6}):
        assert rows_of(tmp_path / "rows.json", {**of, **changed}) == []
    assert rows_of(tmp_path / "none.json", of) == []
