"""FLOPs of training steps: by their shape, counted once."""

import pytest
import torch
from conftest import make_views
from test_benchmark_efficiency import CONFIG, SIZE, decode_flops, encode_flops

from elvsm_nerfstudio.training.flops import TrainingFlops
from elvsm_nerfstudio.views import ViewSet


def test_a_step_is_three_forwards_of_each_scene_counted_once_for_each_shape():
    network, flops, rendered = CONFIG.build(), TrainingFlops(), []
    network.register_forward_hook(lambda network, given, rgb: rendered.append(len(rgb)))

    def of_step(scenes: int, context: int, targets: int, width: int = SIZE) -> int:
        views = (make_views(scenes, count, SIZE, width) for count in (context, targets))
        return flops.of_step(network, ViewSet(*views))

    def expected(scenes: int, context: int, targets: int, tokens: int) -> object:
        scene = context * encode_flops(CONFIG, tokens) + targets * decode_flops(CONFIG, tokens, context)
        return pytest.approx(3 * scenes * scene, rel=0.01)  # beside the rays of other sizes

    tokens = (SIZE // CONFIG.patch_size) ** 2
    assert of_step(2, 3, 2) == expected(2, 3, 2, tokens)
    assert of_step(5, 3, 2) == expected(5, 3, 2, tokens)
    assert rendered == [1]
    assert of_step(1, 3, 2, width=2 * SIZE) == expected(1, 3, 2, 2 * tokens)
    assert of_step(1, 1, 2) == expected(1, 1, 2, tokens)
    assert rendered == [1, 1, 1] and torch.is_grad_enabled()
