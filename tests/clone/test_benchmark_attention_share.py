"""scripts/benchmarks/attention_share.py counts what can be written down."""

from functools import partial

import pytest
import torch

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from scripts.benchmarks.attention_share import share
from scripts.benchmarks.measurements import on_meta
from scripts.benchmarks.methods import Scene


@pytest.mark.parametrize("views", [1, 3])
def test_the_share_of_a_frame_is_that_of_its_products(views):
    config = EfficientLVSMConfig(width=32, num_layers=2, head_dim=16)
    with on_meta():
        with torch.device("meta"):
            network = config.build()
        scene = Scene.make(views, 32, "meta", 1)
        memory = network.encode(scene.first(views), scene.frame)
        found = share(partial(network.decode, memory, scene.path))
    tokens, width = (32 // 8) ** 2, config.width
    attention = config.num_layers * 2 * tokens * tokens * width * (1 + views)
    # Queries, keys, values and output within the view, queries and output across views, MLP; tokenizer and head.
    linear = tokens * width * (config.num_layers * (4 + 2 + 8) * width + (6 + 3) * 8**2)
    rays = 32 * 32 * 3 * 3
    assert found == pytest.approx((attention + rays) / (attention + rays + linear), rel=1e-3)
