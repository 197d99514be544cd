"""scripts/benchmarks/int8.py measures what it says: all linear layers of the blocks, and no others, in int8."""

import torch
from conftest import make_views
from torch import nn

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from scripts.benchmarks.int8 import Int8Linear, in_int8


@torch.no_grad()
def test_a_networks_blocks_are_in_int8_and_render_nearly_the_same():
    torch.manual_seed(0)
    network = EfficientLVSMConfig(width=64, num_layers=2, head_dim=16, init_std=0.1).build()
    views = make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1)
    expected = network(*views)
    for dtype in (None, torch.bfloat16):
        rounded = in_int8(network, dtype)
        linear = [type(module) for module in rounded.modules() if isinstance(module, (nn.Linear, Int8Linear))]
        # A context block has four, a target block seven; tokenizers and head stay as they are.
        assert linear.count(Int8Linear) == 2 * (4 + 7) and len(linear) == 2 * (4 + 7) + 3
        assert 0 < (rounded(*views) - expected).abs().max() < 0.05
    assert torch.equal(network(*views), expected)
