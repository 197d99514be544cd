"""Training as torchrun starts it, on one machine or many: ``torchrun ... -m elvsm_nerfstudio.launch METHOD ...``.

Takes the options of ns-train. nerfstudio's own launcher starts processes by itself and ends with the first of them that
fails; torchrun starts all of them again, and a run that is started again goes on from its last whole checkpoint.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist
import tyro
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.scripts.train import train_loop
from nerfstudio.utils import comms
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from elvsm_nerfstudio.notices import say
from elvsm_nerfstudio.trainer import EfficientLVSMTrainerConfig
from elvsm_nerfstudio.training.checkpoints import last_whole_checkpoint, step_of

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others."""


@record
def main(args: Optional[list[str]] = None) -> None:
    """Command line.

    A run is named by --timestamp, else by torchrun's --rdzv-id: the same command goes on with the same run. Without
    either, only a restart by torchrun does.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") if name not in os.environ]
    if missing:
        raise SystemExit(
            f"error: elvsm_nerfstudio.launch: found no {missing[0]} in the environment; expected to be started by "
            "torchrun, e.g. torchrun --standalone --nproc-per-node 8 -m elvsm_nerfstudio.launch efficient-lvsm --data "
            "DATA. On one machine ns-train efficient-lvsm --machine.num-devices 8 --data DATA does without it"
        )
    config = tyro.cli(AnnotatedBaseConfigUnion, args=args, prog="torchrun ... -m elvsm_nerfstudio.launch")
    if not isinstance(config, EfficientLVSMTrainerConfig) or config.load_config is not None:
        found = "--load-config" if config.load_config else f"the method {config.method_name}"
        raise SystemExit(
            f"error: elvsm_nerfstudio.launch: found {found}; expected a method that trains a network on view sets "
            "(efficient-lvsm, lvsm-decoder-only, ...) and its options"
        )
    if config.data is not None:
        config.pipeline.datamanager.data = config.data

    rank, local_rank, world_size, local_world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    cuda = config.machine.device_type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank)
    _join("nccl" if cuda else "gloo")
    for first in range(0, world_size, local_world_size):
        group = dist.new_group(list(range(first, first + local_world_size)))
        if first <= rank < first + local_world_size:
            comms.LOCAL_PROCESS_GROUP = group

    if _prepare(config, rank):
        train_loop(local_rank, world_size, config, rank)
        comms.synchronize()
    dist.destroy_process_group()


def _join(backend: str) -> None:
    """Makes the process group with the others of this start.

    torchrun (of torch 2.14) keeps one store for all starts, in which the addresses of processes that are gone still
    stand: whoever reads them waits for the dead. Each start has a part of the store of its own.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world_size)


def _prepare(config: EfficientLVSMTrainerConfig, rank: int) -> bool:
    """Names the run and finds from where it goes on, on rank 0 for all; writes its config. Whether there is anything
    left to train."""
    run_id, restarts = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    named = config.timestamp != "{timestamp}" or run_id not in ("", "none")
    if config.timestamp == "{timestamp}":
        config.timestamp = run_id if named else "torchrun"
    start = [None, None, True]
    if rank == 0:
        models = config.get_base_dir() / config.relative_model_dir
        given = config.load_dir is not None or config.load_checkpoint is not None
        if (named and not given) or restarts not in ("", "0"):
            path = last_whole_checkpoint(models)
            if path is not None:
                remaining = step_of(path) + 1 < config.max_num_iterations
                start = [models, step_of(path), remaining]
                if not remaining:
                    say(f"{models.parent} is at its end, {config.max_num_iterations} iterations.")
    dist.broadcast_object_list(start)
    models, step, remaining = start
    if models is not None:
        config.load_dir, config.load_step, config.load_checkpoint = models, step, None
    if rank == 0 and remaining:
        config.print_to_terminal()
        config.save_config()
    return remaining


if __name__ == "__main__":
    main()
