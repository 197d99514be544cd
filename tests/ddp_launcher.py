"""Two processes that train together on a CPU, as nerfstudio's launcher makes them for GPUs: it refuses CPUs.

python ddp_launcher.py FOLDER DATA
"""

from __future__ import annotations

import sys
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from nerfstudio.pipelines import base_pipeline
from nerfstudio.utils import comms
from tiny_training import gradients, tiny_trainer
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


class OnCPU(DistributedDataParallel):
    """Without the GPU's number, which nerfstudio's pipeline gives in any case."""

    def __init__(self, model: torch.nn.Module, device_ids: list[int], **options):
        super().__init__(model, **options)


def without_device_ids() -> None:
    """Lets nerfstudio's pipeline wrap the model although there are no GPUs."""
    barrier = dist.barrier
    base_pipeline.DDP = OnCPU
    dist.barrier = lambda group=None, device_ids=None: barrier(group)


def work(rank: int, folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    comms.LOCAL_PROCESS_GROUP = dist.new_group(list(range(RANKS)))
    without_device_ids()

    def trainer_of(name: str, **options):
        return tiny_trainer(folder / name / f"rank{rank}", data, rank, RANKS, **options)

    trainer = trainer_of("plain", scenes_per_batch=2, ema_decay=0.9, max_num_iterations=2)
    drawn = []
    next_train = trainer.pipeline.datamanager.next_train
    trainer.pipeline.datamanager.next_train = lambda step: drawn.append(next_train(step)) or drawn[-1]
    trainer.train_iteration(0)
    result = {"images": drawn[0][1]["image"], "gradients": gradients(trainer)}
    trainer.train()
    result["average"] = trainer.average.network.state_dict()

    steps = {"network": 2}
    accumulating = trainer_of(
        "accumulating", scenes_per_batch=1, gradient_accumulation_steps=steps, max_num_iterations=2
    )
    accumulating.train_iteration(0)
    result["unsynchronised"] = gradients(accumulating)
    accumulating.train_iteration(1)
    result["accumulated"] = gradients(accumulating)

    prefixed = trainer_of("prefixed", scenes_per_batch=1, prefix_loss=True)
    prefixed.train_iteration(0)
    result["prefixed"] = gradients(prefixed)
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    folder, data = map(Path, sys.argv[1:])
    # Forked, so that nerfstudio is imported once.
    processes = [get_context("fork").Process(target=work, args=(rank, folder, data)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))


if __name__ == "__main__":
    main()
