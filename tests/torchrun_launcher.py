"""Two runs of two processes each, as torchrun starts them; in the second, one process is killed in the middle.

python torchrun_launcher.py FOLDER METHOD OPTIONS ...

torchrun's own launcher, but its processes are forked, so that nerfstudio is imported once.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Optional

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from elvsm_nerfstudio import launch
from elvsm_nerfstudio.trainer import EfficientLVSMTrainer

DIES_AT = 4
"""The iteration that rank 1 begins last: after the checkpoint of iteration 2, before that of iteration 4."""


def work(options: list[str], dies_at: Optional[int]) -> None:
    """One process of a run, as torchrun has set its environment."""
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        train_iteration = EfficientLVSMTrainer.train_iteration

        def killed(self: EfficientLVSMTrainer, step: int):
            if step == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return train_iteration(self, step)

        EfficientLVSMTrainer.train_iteration = killed
    launch.main(options)


def main() -> None:
    folder, *options = sys.argv[1:]
    for name, dies_at in (("straight", None), ("killed", DIES_AT)):
        standalone = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="none")
        config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=1, start_method="fork", **standalone)
        elastic_launch(config, work)([*options, "--output-dir", f"{folder}/{name}"], dies_at)


if __name__ == "__main__":
    main()
