"""nerfstudio's trainer for runs that take days: checkpoints that survive, exact resuming, averages over accumulated
steps, averaged weights, and what a step costs."""

from __future__ import annotations

import functools
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

import torch
import yaml
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import comms, profiler, writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.misc import step_check
from torch import Tensor
from torch.utils._pytree import tree_map

from elvsm_nerfstudio.evaluation.timing import peak_flops, synchronise
from elvsm_nerfstudio.files import whole
from elvsm_nerfstudio.nn.device_memory import resident_bytes
from elvsm_nerfstudio.nn.network import fp32_products
from elvsm_nerfstudio.nn.weights import RUN_PREFIX, network_metadata
from elvsm_nerfstudio.notices import say, warn
from elvsm_nerfstudio.pipeline import EfficientLVSMPipeline
from elvsm_nerfstudio.programs import config_being_read
from elvsm_nerfstudio.training.checkpoints import (
    CheckpointError,
    check_checkpoint,
    check_folder,
    check_space,
    checkpoint_bytes,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    step_of,
    write_checkpoint,
)
from elvsm_nerfstudio.training.ema import WeightAverage
from elvsm_nerfstudio.training.flops import TrainingFlops
from elvsm_nerfstudio.training.optimizers import WarmupSchedulerConfig
from elvsm_nerfstudio.training.run_config import network_of_run


@dataclass
class EfficientLVSMTrainerConfig(TrainerConfig):
    """nerfstudio's options, of which ``max_num_iterations`` is the total, also where a run is resumed."""

    _target: type = field(default_factory=lambda: EfficientLVSMTrainer)
    """target class to instantiate"""
    ema_decay: Optional[float] = None
    """Keeps an exponential moving average of the weights with this decay, e.g. 0.999; it is what is evaluated, rendered
    and exported. None: the weights as they are."""
    gradient_accumulation_steps: dict[str, int] = field(default_factory=dict)
    """Iterations over whose batches a step's gradient is the mean, for every group of parameters the same: 'network 4'
    trains as if batches were four times as large. Warm-up and decay count steps, everything else iterations."""

    _read_from: ClassVar[Optional[Path]] = None

    def save_config(self) -> None:
        """Writes the run's config.yml: the first thing that ns-train does, so what cannot end well stops here.

        What the run was resumed from is left as a comment only: as options, ns-eval would look for that step here.

        Raises:
            CheckpointError: where the folder cannot be written to, or holds another run's checkpoints, and where the
                run to go on from has another network.
        """
        folder = self.get_base_dir()
        check_folder(folder, f"--output-dir {self.output_dir}")
        models = folder / self.relative_model_dir
        found = list_checkpoints(models)
        source = self.load_checkpoint.parent if self.load_dir is None and self.load_checkpoint else self.load_dir
        if found and (source is None or source.resolve() != models.resolve()):
            raise CheckpointError(
                f"{folder} is a run already, with {found[-1].name}. To go on with it, give its command again with "
                f"--load-dir {models} (not --load-config, which drops every other option); to start anew, choose "
                "another --timestamp or --experiment-name, or delete it"
            )
        network = self.pipeline.model.network
        trained = None if source is None else network_of_run(source.parent / "config.yml")
        if trained is not None and not trained.is_same_as(network):
            raise CheckpointError(
                f"{source} is of a run of {trained}; found options for {network}. Give those that it was trained with "
                f"({source.parent / 'config.yml'})"
            )
        content = yaml.dump(replace(self, load_dir=None, load_step=None, load_checkpoint=None))
        if source is not None:
            content = f"# resumed from {source if self.load_checkpoint is None else self.load_checkpoint}\n{content}"
        with whole(folder / "config.yml") as partial:
            partial.write_text(content, "utf8")

    def get_base_dir(self) -> Path:
        """The run's folder; of a run that is read, the one that its config.yml lies in, wherever it was trained."""
        return self._read_from or super().get_base_dir()

    def get_checkpoint_dir(self) -> Path:
        """Folder of the run's checkpoints.

        ns-eval, ns-render and ns-viewer ask for it just before they make the pipeline and load the latest one, and tell
        nobody else that they do; so both are looked for here. A run that is being resumed looks at what it loads by
        itself.

        Raises:
            CheckpointError: naming the damaged checkpoint, and the one before.
            DataError: where the data are gone.
        """
        config = config_being_read()
        if config is not None:
            if (config.parent / self.relative_model_dir).is_dir():
                self._read_from = config.parent
            self.pipeline.datamanager.find_data(config)
        folder = super().get_checkpoint_dir()
        if self.load_dir is None and self.load_checkpoint is None and list_checkpoints(folder):
            check_checkpoint(find_checkpoint(folder, self.load_step))
        return folder


class EfficientLVSMTrainer(Trainer):
    """One iteration is one batch on each device; a step is as many of them as are accumulated."""

    config: EfficientLVSMTrainerConfig
    pipeline: EfficientLVSMPipeline

    def __init__(self, config: EfficientLVSMTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        for option in ("mixed_precision", "use_grad_scaler"):
            if getattr(config, option):
                raise ValueError(
                    f"--{option.replace('_', '-')} True: expected False; precision is the model's own, "
                    "--pipeline.model.precision, and needs no scaler"
                )
        super().__init__(config, local_rank, world_size)
        self.average: Optional[WeightAverage] = None
        self._total = config.max_num_iterations
        self._accumulated = 1
        self._saver = ThreadPoolExecutor(max_workers=1)
        self._saving: Optional[Future] = None
        self._trained = -1  # the last iteration that is in the weights; nerfstudio's own count differs by version
        self._cost: Counter[str] = Counter()
        self._flops, self._peak = TrainingFlops(), None

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        super().setup(test_mode)
        self._peak = peak_flops(self.pipeline.device)
        if comms.is_main_process():
            self._check_room()

    def setup_optimizers(self) -> Optimizers:
        groups = list(self.pipeline.get_param_groups())
        self._accumulated = self._accumulation_of(groups)
        steps = self.config.max_num_iterations // self._accumulated
        scheduled = {name: _ending_at(steps, name, self.config.optimizers[name]) for name in groups}
        self.config = replace(self.config, optimizers={**self.config.optimizers, **scheduled})
        optimizers = super().setup_optimizers()
        if self.config.ema_decay is not None:
            model = self.pipeline.model
            self.average = model.average = WeightAverage(model.network, self.config.ema_decay)
        return optimizers

    def _accumulation_of(self, groups: list[str]) -> int:
        given = self.config.gradient_accumulation_steps
        steps = {given.get(group, 1) for group in groups}
        if set(given) - set(groups) or len(steps) != 1 or min(steps) < 1:
            raise ValueError(
                f"--gradient-accumulation-steps: found {given}; expected the same number, at least 1, for each of the "
                f"groups {' and '.join(groups)}"
            )
        (number,) = steps
        if self.config.max_num_iterations % number:
            raise ValueError(
                f"--max-num-iterations {self.config.max_num_iterations}: expected a multiple of the {number} that "
                "--gradient-accumulation-steps makes a step of"
            )
        return number

    # Training

    def train(self) -> None:
        """Trains up to iteration ``max_num_iterations``, counted from the beginning of the run's training."""
        if not comms.is_main_process():
            # nerfstudio writes it on every rank.
            self.pipeline.datamanager.train_dataparser_outputs.save_dataparser_transform = lambda path: None
        super().train()

    @profiler.time_function
    def train_iteration(self, step: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward pass of one batch; with the last batch of a step, the optimisers' step."""
        start = time.perf_counter()
        first, last = step % self._accumulated == 0, (step + 1) % self._accumulated == 0
        if first:
            self.optimizers.zero_grad_all()
        alone = self.world_size > 1 and not last
        # Gradients of all ranks are averaged once for each step.
        with self.pipeline._model.no_sync() if alone else nullcontext():
            _, losses, metrics = self.pipeline.get_train_loss_dict(step=step)
            loss = functools.reduce(torch.add, losses.values())
            with fp32_products("high", self.pipeline.device):
                (loss / self._accumulated).backward()
        if last:
            self.optimizers.optimizer_step_all()
            self.optimizers.scheduler_step_all(step)
            if self.average is not None and not self.optimizers.optimizers["network"].surely_skipped:
                self.average.update(self.pipeline.model.network)
        if self.config.log_gradients:
            gradients = {name: p.grad for name, p in self.pipeline.model.named_parameters() if p.grad is not None}
            metrics.update({f"Gradients/{name}": gradient.norm() for name, gradient in gradients.items()})
        if step_check(step, self.config.logging.steps_per_log, run_at_zero=True):
            loss, losses = self._mean_over_ranks(loss, losses)
        self._log_cost(step, start)
        self._trained = step
        # Releases of nerfstudio would train max_num_iterations more where a run goes on; its main branch would not.
        if step + 1 >= self._total:
            self.stop_training = True
        return loss.detach(), {name: value.detach() for name, value in losses.items()}, metrics

    def _mean_over_ranks(self, loss: Tensor, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses as they are logged: of the batches of all ranks, where nerfstudio would log the first one's."""
        if self.world_size == 1:
            return loss, losses
        means = torch.stack([loss.detach(), *(value.detach() for value in losses.values())])
        torch.distributed.all_reduce(means)
        loss, *values = (means / self.world_size).unbind()
        return loss, dict(zip(losses, values))

    def _log_cost(self, step: int, start: float) -> None:
        """What the iterations since the last log cost; the first one, which warms up, is left out."""
        logged = step_check(step, self.config.logging.steps_per_log)
        if logged:
            synchronise(self.pipeline.device)  # a GPU may still be busy with what it was given in these iterations
        waited, self.pipeline.datamanager.seconds_waited = self.pipeline.datamanager.seconds_waited, 0.0
        device, cost = self.pipeline.device, self._cost
        if step > self._start_step:
            cost.update(iterations=1, seconds=time.perf_counter() - start, waited=waited)
            cost.update(scenes=self.world_size * self.pipeline.datamanager.config.scenes_per_batch)
            network, views = self.pipeline.model.network, self.pipeline.datamanager.views
            pixels = sum(part.directions[..., 0].numel() for part in (views.context, views.target))
            cost.update(tokens=self.world_size * pixels // network.config.patch_size**2)
            if self._peak is not None:
                cost.update(flops=self._flops.of_step(network, views))
        if logged and cost:
            seconds = cost["seconds"]
            writer.put_scalar("throughput/scenes_per_second", cost["scenes"] / seconds, step)
            writer.put_scalar("throughput/tokens_per_second", cost["tokens"] / seconds, step)
            writer.put_scalar("throughput/data_wait_seconds", cost["waited"] / cost["iterations"], step)
            if self._peak is not None:
                writer.put_scalar("throughput/share_of_peak", cost["flops"] / seconds / self._peak, step)
            for name, peak in _peak_bytes(device).items():
                writer.put_scalar(f"peak_memory_MiB/{name}", peak / 2**20, step)
            cost.clear()

    # Checkpoints

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Saves the run as it is after the last iteration that was trained, whatever step nerfstudio gives.

        Older checkpoints go once the new one has been read back. On a GPU training goes on while a copy on the host is
        written; the next save, and the last one at the latest, waits for that.

        Raises:
            CheckpointError: at the end of training. Before, a failure is reported, and tried again at the next save.
        """
        if self._trained < 0:
            return
        self._report_saved()
        path, state = checkpoint_path(self.checkpoint_dir, self._trained), self._state(self._trained)
        on_gpu = self.pipeline.device.type == "cuda"
        self._saving = self._saver.submit(self._write, path, _host_copy(state) if on_gpu else state)
        if self.training_state == "completed":
            self._saving.result()
        elif not on_gpu:
            self._report_saved()

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        write_checkpoint(path, state)
        if self.config.save_only_latest_checkpoint:
            for other in list_checkpoints(self.checkpoint_dir):
                if step_of(other) < state["step"]:
                    other.unlink()

    def _report_saved(self) -> None:
        """Waits for the checkpoint that is being written, if there is one; says what went wrong with it."""
        saving, self._saving = self._saving, None
        error = None if saving is None else saving.exception()
        if isinstance(error, CheckpointError):
            say(f"{error} Training goes on; it is tried again in {self.config.steps_per_save} iterations.", "bold red")
        elif error is not None:
            raise error

    def _state(self, step: int) -> dict[str, Any]:
        """nerfstudio's layout; ``pipeline`` is what is to be rendered. Where that is the averaged weights, those that
        are trained are beside it, under ``average``. All ranks hold the same."""
        pipeline = {
            name.replace("_model.module.", "_model.", 1): tensor for name, tensor in self.pipeline.state_dict().items()
        }
        state = {
            "step": step,
            "network": network_metadata(self.pipeline.model.config.network),
            "pipeline": pipeline,
            "optimizers": {name: x.state_dict() for name, x in self.optimizers.optimizers.items()},
            "schedulers": {name: x.state_dict() for name, x in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
        }
        if self.average is not None:
            averaged = self.average.network.state_dict()
            pipeline.update({f"{RUN_PREFIX}{name}": tensor for name, tensor in averaged.items()})
            trained = self.pipeline.model.network.state_dict()
            state["average"] = {"updates": self.average.updates, "trained": trained}
        return state

    def _load_checkpoint(self) -> None:
        """Goes on from ``load_checkpoint`` or from ``load_dir``, as if training had never stopped.

        Raises:
            CheckpointError: for one that is missing, damaged or of other parameter groups.
            ValueError: where nothing is left to train.
        """
        config = self.config
        if config.load_dir is not None:
            path = find_checkpoint(config.load_dir, config.load_step)
        elif config.load_checkpoint is not None:
            path = config.load_checkpoint
        else:
            say("No checkpoint to go on from: training from the beginning.")
            return
        state = read_checkpoint(path)
        if set(state.get("optimizers", {})) != set(self.optimizers.optimizers):
            raise CheckpointError(
                f"checkpoint {path}: found optimisers of {sorted(state.get('optimizers', {}))}, expected of "
                f"{sorted(self.optimizers.optimizers)}. Give the options that the run was trained with; to take its "
                "weights alone, --pipeline.model.checkpoint"
            )
        self.pipeline.load_pipeline(state["pipeline"], state["step"])
        self._load_average(path, state.get("average"))
        self.optimizers.load_optimizers(state["optimizers"])
        if config.load_scheduler:
            self.optimizers.load_schedulers(state["schedulers"])
        self._trained = state["step"]
        # A step of which not all batches had been seen is begun again: nothing of it is in the weights yet.
        self._start_step = state["step"] + 1
        self._start_step -= self._start_step % self._accumulated
        if self._start_step >= config.max_num_iterations:
            raise ValueError(
                f"--max-num-iterations {config.max_num_iterations}: {path} has {state['step'] + 1} behind it, so that "
                "nothing is left to do. Iterations count from the beginning of training: expected more than those"
            )
        say(f"Going on from {path} with iteration {self._start_step} of {config.max_num_iterations}.")

    def _load_average(self, path: Path, saved: Optional[dict[str, Any]]) -> None:
        network = self.pipeline.model.network
        if self.average is not None:
            self.average.restart(network, saved["updates"] if saved else 0)
            if not saved:
                warn(f"{path} holds no averaged weights: the average starts from its weights.")
        elif saved:
            warn(f"{path} holds averaged weights; without --ema-decay they are left behind.")
        if saved:
            network.load_state_dict(saved["trained"])

    def _check_room(self) -> None:
        parameters = [p for group in self.optimizers.parameters.values() for p in group]
        size = checkpoint_bytes(parameters, copies=3 if self.average is None else 4)
        if self.config.save_only_latest_checkpoint:
            there = min(1, len(list_checkpoints(self.checkpoint_dir)))
            check_space(self.checkpoint_dir, (2 - there) * size, "a checkpoint beside the one before it")
        else:
            count = -(-(self.config.max_num_iterations - self._start_step) // self.config.steps_per_save)
            check_space(self.checkpoint_dir, count * size, f"{count} checkpoints (--save-only-latest-checkpoint False)")


def _ending_at(steps: int, group: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a group of parameters, with a cosine that ends with the run."""
    scheduler = options.get("scheduler")
    if not isinstance(scheduler, WarmupSchedulerConfig) or scheduler.decay != "cosine":
        return options
    given = steps if scheduler.max_steps is None else scheduler.max_steps
    if abs(given - steps) > 1:  # one more is usual: the evaluation at step n is after n + 1 steps
        raise ValueError(
            f"--optimizers.{group}.scheduler.max-steps {given}: expected {steps}, the optimiser steps of "
            "--max-num-iterations, or to be left out: it is then the same. A cosine that ends before the run trains "
            "the rest of it at its lowest learning rate; one that ends after it never gets there"
        )
    return {**options, "scheduler": replace(scheduler, max_steps=given)}


def _host_copy(state: Any) -> Any:
    """The state with tensors of its own on the host, which training does not change."""
    return tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, state)


def _peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory that this process has held so far: on the host, where Linux tells, and on a GPU."""
    host = resident_bytes("VmHWM")
    peaks = {} if host is None else {"host": host}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks
