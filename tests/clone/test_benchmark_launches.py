"""scripts/benchmarks/launches.py counts what a GPU would be given, and a frame is given no more than it says."""

import pytest
import torch
from pretended_cuda import without_a_gpu

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from scripts.benchmarks.launches import of_a_frame, table

pytestmark = [
    without_a_gpu,
    pytest.mark.skipif(torch.__version__[:4] != "2.14", reason="stands in for inner parts of torch 2.14"),
]


@pytest.fixture(autouse=True)
def without_code_of_other_tests():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, products, eager, compiled",
    [
        ({}, (8, 5), (18, 19), (16, 19)),
        ({"camera_encoding": "prope", "ray_frame": "camera"}, (10, 8), (42, 73), (24, 73)),
    ],
    ids=["plain", "plus"],
)
def test_kernels_of_a_frame_for_each_layer_and_beside_layers(options, products, eager, compiled):
    config = EfficientLVSMConfig(width=64, num_layers=2, head_dim=32, **options)
    for compile, (layer, beside) in ((False, eager), (True, compiled)):
        found = of_a_frame(config, 32, compile)
        assert found.products == 2 * products[0] + products[1]
        assert 2 * layer + beside - 6 <= found.all <= 2 * layer + beside, compile


def test_the_table_has_a_row_for_each_network_and_what_was_aimed_at():
    small = EfficientLVSMConfig(width=64, num_layers=2, head_dim=32)
    *_, row = table({"small": (small, 12)}, 32).splitlines()
    name, eager, compiled, products, goal = row.strip("| ").split(" | ")
    assert (name, products, goal) == ("small", "21", "at most 12") and int(products) < int(compiled) < int(eager)
