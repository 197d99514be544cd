"""Averaged weights: an exponential moving average of a network's weights over the steps of its training."""

from __future__ import annotations

import torch

from elvsm_nerfstudio.nn.network import SceneNetwork


class WeightAverage:
    """A second network, whose weights follow those of the first.

    After update n (from 0) ``average = d average + (1 - d) weights`` with ``d = min(decay, (1 + n) / (10 + n))``, so
    that the first weights are forgotten at once (TensorFlow's rule). It is no module: neither state dicts, nor
    optimisers, nor DDP find it.

    Args:
        network: the network that is trained, on its device.
        decay: of the average, in (0, 1); 0.999 looks back about a thousand steps.
    """

    def __init__(self, network: SceneNetwork, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"--ema-decay {decay}: expected between 0 and 1, e.g. 0.999")
        self.decay = decay
        # Not a copy of the module: that would bring along the hooks by which losses look into it.
        self.network = network.config.build().to(next(network.parameters()).device).eval().requires_grad_(False)
        """The averaged network; memories that it encoded are told from older ones by its ``weights_token``."""
        for name in ("autocast_dtype", "compiler", "captured_frames"):
            setattr(self.network, name, getattr(network, name))
        self.restart(network)

    @torch.no_grad()
    def update(self, network: SceneNetwork) -> None:
        """Takes in the weights of a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        self.updates += 1

    def restart(self, network: SceneNetwork, updates: int = 0) -> None:
        """Goes on from a network's weights, as the average after so many updates."""
        self.network.load_state_dict(network.state_dict())
        self.updates = updates
