"""Two processes that train together on a CPU, as nerfstudio's launcher makes them for GPUs: it refuses CPUs.

python ddp_launcher.py FOLDER DATA
"""

from __future__ import annotations

import sys
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from nerfstudio.utils import comms
from tiny_training import gradients, tiny_trainer

RANKS = 2


def work(rank: int, folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    comms.LOCAL_PROCESS_GROUP = dist.new_group(list(range(RANKS)))

    def trainer_of(name: str, **options):
        return tiny_trainer(folder / name / f"rank{rank}", data, rank, RANKS, **options)

    trainer = trainer_of("plain", scenes_per_batch=2, ema_decay=0.9, max_num_iterations=2)
    drawn = []
    next_train = trainer.pipeline.datamanager.next_train
    trainer.pipeline.datamanager.next_train = lambda step: drawn.append(next_train(step)) or drawn[-1]
    loss, losses, _ = trainer.train_iteration(0)
    result = {"images": drawn[0][1]["image"], "gradients": gradients(trainer), "losses": [loss, losses["mse"]]}
    trainer.train()
    result["average"] = trainer.average.network.state_dict()
    trainer.pipeline.datamanager.eval_entries = trainer.pipeline.datamanager.train_entries[:3]
    result["scores"] = trainer.pipeline.get_average_eval_image_metrics()

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

    muon = trainer_of("muon", scenes_per_batch=1, muon=True)
    muon.train_iteration(0)
    result["muon"] = deepcopy(muon.pipeline.model.network.state_dict())
    next_train = muon.pipeline.datamanager.next_train

    def nan_on_one_rank(step: int):
        views, batch = next_train(step)
        return views, {"image": batch["image"] * (torch.nan if rank == 1 else 1)}

    muon.pipeline.datamanager.next_train = nan_on_one_rank
    muon.train_iteration(1)
    result["after a bad batch"] = deepcopy(muon.pipeline.model.network.state_dict())
    result["counts"] = muon.optimizers.optimizers["network"].counts

    compressed = trainer_of("compressed", scenes_per_batch=2, compress_gradients=True)
    compressed.train_iteration(0)
    result["compressed"] = gradients(compressed)
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
