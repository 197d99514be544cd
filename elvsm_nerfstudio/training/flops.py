"""What training steps compute, for the share of a GPU's peak that they reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from elvsm_nerfstudio.nn.network import SceneNetwork
from elvsm_nerfstudio.views import ViewSet

aten = torch.ops.aten


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products and attentions, a multiply-add counting as two.

    On the meta device nothing is computed, and attention is its two products. On a CPU it is one fused kernel that
    torch's counter does not know. Of compiled code nothing is counted.
    """
    fused_on_cpu = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused_on_cpu) as counter:
        run()
    return counter.get_total_flops()


class TrainingFlops:
    """FLOPs of steps: three times a forward's, for forward and backward, whatever is computed again in between.

    Of the network alone, every target seeing all context views. Counted once for each number and size of views, by
    rendering one scene of the batch.
    """

    def __init__(self):
        self._of_scene: dict[tuple[torch.Size, torch.Size], int] = {}

    def of_step(self, network: SceneNetwork, views: ViewSet) -> int:
        """Of a step on a batch, by its shape."""
        context, target = views.context, views.target
        shape = context.directions.shape[1:], target.directions.shape[1:]
        if shape not in self._of_scene:
            compiler, network.compiler = network.compiler, None
            try:
                with torch.no_grad():
                    self._of_scene[shape] = count_flops(lambda: network(context.scenes(1), target.scenes(1)))
            finally:
                network.compiler = compiler
        return 3 * context.num_scenes * self._of_scene[shape]
