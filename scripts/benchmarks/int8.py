"""What int8 would bring on a CPU: linear layers of all blocks with weights rounded to int8 once, inputs in each call.

    elvsm run --weights pretrained --data data/objects64 --protocol wide-range    # prints a config.yml
    python -m scripts.benchmarks.int8 --run CONFIG

Prints PSNR on all evaluated scenes, and the time of a frame from a kept memory, both against the precision that this
package takes on the machine by itself. All precisions render each frame in turns on one thread; what is measured is
processor time, which other work on the machine stretches little.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from nerfstudio.utils.eval_utils import eval_setup
from torch import Tensor, nn

from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.evaluation.protocols import find_protocol
from elvsm_nerfstudio.nn.network import SceneNetwork


class Int8Linear(nn.Module):
    """A linear layer in int8 between inputs and outputs of any precision."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is to leave torch for torchao
            (self.quantized,) = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized(x.float()).to(x.dtype)


def in_int8(network: SceneNetwork, dtype: torch.dtype | None) -> SceneNetwork:
    """A copy with all linear layers of its blocks in int8, and the rest in a precision."""
    network = copy.deepcopy(network)
    network.autocast_dtype = dtype
    for blocks in network.streams.values():
        for module in list(blocks.modules()):
            for name, part in module.named_children():
                if type(part) is nn.Linear:
                    setattr(module, name, Int8Linear(part))
    return network


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run's config.yml")
    parser.add_argument("--context-views", type=int, default=8)
    parser.add_argument("--targets", type=int, default=4, help="frames of each scene, the first ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, pipeline, _, _ = eval_setup(args.run)
    own, data = pipeline.model.rendering_network, pipeline.datamanager
    networks = {"by itself": own}
    networks |= {"int8, else fp32": in_int8(own, None), "int8, else bf16": in_int8(own, torch.bfloat16)}
    rule = replace(find_protocol("wide-range").views, num_context_views=args.context_views)
    quality: dict[str, list[float]] = {name: [] for name in networks}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for entry in data.eval_entries:
        views = data.evaluation_scene(entry, rule).views
        memories = {name: network.encode(views.context) for name, network in networks.items()}
        for index in range(min(args.targets, views.target.num_views)):
            target = views.target.select([index])
            for name, network in networks.items():
                begun = time.process_time()
                rgb = network.decode(memories[name], target)
                seconds[name].append(time.process_time() - begun)
                quality[name].append(float(psnr(rgb[0, 0], target.rgb[0, 0])))
    frames = len(quality["by itself"])
    print(f"{len(data.eval_entries)} scenes, {frames} frames from {args.context_views} views, 1 thread", end="; ")
    print(f"'by itself' is {own.autocast_dtype or 'fp32'}\n")
    print("| precision | PSNR | against the first | times the first's time (middle half) |\n|---|---|---|---|")
    for name in networks:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["by itself"]))
        time_ratio = f"{statistics.median(ratios):.2f} ({ratios[frames // 4]:.2f} to {ratios[3 * frames // 4]:.2f})"
        difference = statistics.fmean(quality[name]) - statistics.fmean(quality["by itself"])
        print(f"| {name} | {statistics.fmean(quality[name]):.2f} | {difference:+.3f} | {time_ratio} |")


if __name__ == "__main__":
    main()
