"""Trains the variants of a study through ns-train: how many steps fit into its time, and the training itself."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import numpy as np

from elvsm_nerfstudio.compare.methods import device_to_use
from elvsm_nerfstudio.evaluation.report import write_json
from elvsm_nerfstudio.evaluation.results import code_version
from elvsm_nerfstudio.evaluation.training_curves import read_scalars
from elvsm_nerfstudio.runs import read_config
from elvsm_nerfstudio.training.checkpoints import checkpoint_path, list_checkpoints
from scripts.study.layout import Layout, Settings, read_json
from scripts.study.variants import SAME_FOR_ALL, Variant

PARTS = 8
"""Checkpoints of a training, and points of its curve."""
LOG_EVERY = 10
"""Steps over which the trainer's log averages."""
WARM_UP, TIMED = 10, 40
"""Steps of a calibration. Ours."""

SCENES_PER_SECOND, TOKENS_PER_SECOND = "throughput/scenes_per_second", "throughput/tokens_per_second"
"""Names of the throughput in the trainer's log."""

Tick = Callable[[float], None]
"""Told, every now and then, for how many seconds something has been running."""


class TrainingError(RuntimeError):
    """ns-train failed; the message has its last lines."""


@dataclass(frozen=True)
class Plan:
    """How long a variant trains, for all seeds."""

    method: str
    options: dict[str, str]
    steps: int
    seconds_per_step: float
    """As calibrated, of a step with the mean number of views, on a core of its own."""
    calibration: dict[str, Any]
    """What was measured; empty where the number of steps was given."""


def options_of(settings: Settings, variant: Variant) -> dict[str, str]:
    """What a variant is trained with: the study's options, the variant's, those of the command line; later ones win.

    Raises:
        ValueError: for an option that the study sets itself.
    """
    given = settings.options()
    taken = sorted(set(given) & set(_set_by_study(settings, Layout(Path()), "", 0, 1)))
    if taken:
        raise ValueError(f"--train-options --{taken[0]}: the study sets it itself; expected other options of ns-train")
    return {**SAME_FOR_ALL, **variant.options, **given}


def find_plan(layout: Layout, settings: Settings, variant: Variant) -> Optional[Plan]:
    """The variant's plan, if it has one.

    Raises:
        ValueError: where the variant has been trained with other options here.
    """
    options, found = options_of(settings, variant), read_json(layout.plan(variant.name))
    plan = None if found is None else Plan(**found)
    if plan is not None and (plan.method, plan.options) != (variant.method, options):
        raise ValueError(
            f"--output {layout.root}: {variant.name} was trained there as {plan.method} with {plan.options}; expected "
            f"the same, found {variant.method} with {options}. Choose another --output, or delete "
            f"{layout.folder(variant.name)} and its folders in {layout.root / 'runs'}"
        )
    return plan


def make_plan(layout: Layout, settings: Settings, variant: Variant, seed: int, lock: int, tick: Tick) -> Plan:
    """The variant's plan: the one that is there, or else from a calibration.

    Time is that of the trainer's own iterations in its log, times the share of a core that the process had (processor
    time / wall-clock time), so that a busy neighbour gives no variant fewer steps. Steps are counted in tokens: with
    a random number of context views, 40 steps are not all alike.

    Raises:
        ValueError: as ``find_plan``.
        TrainingError: as ``train``.
    """
    plan = find_plan(layout, settings, variant)
    if plan is not None:
        return plan
    options = options_of(settings, variant)
    if settings.steps is not None:
        plan = Plan(variant.method, options, settings.steps, 0.0, calibration={})
    else:
        measured = _calibrate(layout, settings, variant, options, seed, lock, tick)
        seconds = measured["tokens_per_step"] / measured["tokens_per_second"] * measured["core_share"]
        plan = Plan(variant.method, options, steps_within(60 * settings.minutes, seconds), seconds, measured)
    write_json(layout.plan(variant.name), asdict(plan))
    return plan


def steps_within(seconds: float, seconds_per_step: float) -> int:
    """The steps that fit, a multiple of ``PARTS``, at least one of them."""
    return max(1, int(seconds / seconds_per_step) // PARTS) * PARTS


def _calibrate(
    layout: Layout, settings: Settings, variant: Variant, options: dict[str, str], seed: int, lock: int, tick: Tick
) -> dict[str, Any]:
    steps = WARM_UP + TIMED + 1  # the log's averages end with steps 10, 20, ..., counted from 0
    experiment = f"{variant.name}-calibration"
    fixed = _set_by_study(settings, layout, experiment, seed, steps)
    run = layout.root / "runs" / experiment / variant.method / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = _command(variant.method, {**options, **fixed})
    session = _begin(command)
    _run(command, session, layout.log(variant.name), settings.threads, lock, tick)
    _check(session, variant.name, layout.log(variant.name))
    datamanager = (config := read_config(run / "config.yml", "--variants").pipeline).datamanager
    logged = read_scalars(run, [SCENES_PER_SECOND, TOKENS_PER_SECOND])
    scenes, tokens = logged[SCENES_PER_SECOND], logged[TOKENS_PER_SECOND]
    timed = [step for step in scenes if step > WARM_UP]
    seconds = {step: LOG_EVERY * datamanager.scenes_per_batch / scenes[step] for step in timed}
    height, width = datamanager.image_size
    views = statistics.fmean(datamanager.context_view_bounds) + datamanager.num_target_views
    shutil.rmtree(run.parents[1])
    return {
        "steps": TIMED,
        "tokens_per_second": sum(seconds[step] * tokens[step] for step in timed) / sum(seconds.values()),
        "tokens_per_step": datamanager.scenes_per_batch * views * height * width / config.model.network.patch_size**2,
        "core_share": core_share([session], settings.threads),
        **session,
    }


def train(
    layout: Layout, settings: Settings, variant: Variant, seed: int, plan: Plan, lock: int, tick: Tick
) -> dict[str, Any]:
    """Trains a variant to its last step, from its last checkpoint if there is one; returns how it went.

    Raises:
        TrainingError: with what ns-train said last; called again, it is tried again.
    """
    path, run = layout.training(variant.name, seed), layout.run(variant, seed)
    record = read_json(path) or {"sessions": []}
    models = run / "nerfstudio_models"
    last = checkpoint_path(models, plan.steps - 1)
    if not last.exists():
        found = list_checkpoints(models)
        fixed = _set_by_study(settings, layout, layout.experiment(variant.name, seed), seed, plan.steps)
        if found:
            fixed["load-dir"] = str(models)
        else:
            shutil.rmtree(run, ignore_errors=True)
        command = _command(variant.method, {**plan.options, **fixed})
        session = {"from_step": steps_of(found[-1]) if found else 0, **_begin(command)}
        record["sessions"].append(session)
        write_json(path, record)
        try:
            _run(command, session, layout.log(variant.name), settings.threads, lock, tick)
        finally:
            write_json(path, record)
        _check(session, variant.name, layout.log(variant.name))
    share = core_share(record["sessions"], settings.threads)
    seconds = seconds_after(run, [plan.steps], plan.options)[0]
    record |= {"steps": plan.steps, "seconds": seconds * share, "core_share": share}
    write_json(path, record)
    return record


def steps_of(checkpoint: Path) -> int:
    """Steps that a checkpoint has behind it."""
    return int(checkpoint.stem.removeprefix("step-")) + 1


def core_share(sessions: Sequence[dict[str, Any]], threads: int) -> float:
    """The share of a core that a process of one thread had; 1 where that cannot be known."""
    ended = [session for session in sessions if "cpu_seconds" in session]
    if threads > 1 or device_to_use().type != "cpu" or not ended:
        return 1.0
    return min(1.0, sum(s["cpu_seconds"] for s in ended) / sum(s["wall_seconds"] for s in ended))


def seconds_after(run: Path, steps: Sequence[int], options: dict[str, str]) -> list[float]:
    """Seconds of the trainer's own iterations up to each number of steps, from its log.

    A killed training's last lines may be missing; they count as the mean of all others.
    """
    scenes = int(options["pipeline.datamanager.scenes-per-batch"])
    rates = read_scalars(run, [SCENES_PER_SECOND]).get(SCENES_PER_SECOND, {})
    per_step = {step: scenes / rate for step, rate in rates.items()}
    if not per_step:
        return [0.0] * len(steps)
    mean = statistics.fmean(per_step.values())
    ends = range(0, max(steps) + LOG_EVERY, LOG_EVERY)
    passed = np.cumsum([0.0] + [LOG_EVERY * per_step.get(end, mean) for end in ends[1:]])
    return np.interp(steps, ends, passed).tolist()


def _set_by_study(settings: Settings, layout: Layout, experiment: str, seed: int, steps: int) -> dict[str, str]:
    return {
        "data": settings.data,
        "machine.device-type": device_to_use().type,
        "machine.seed": str(seed),
        "pipeline.datamanager.seed": str(seed),
        "pipeline.datamanager.num-workers": "0",
        "vis": "tensorboard",
        "logging.steps-per-log": str(LOG_EVERY),
        "output-dir": str(layout.root / "runs"),
        "experiment-name": experiment,
        "timestamp": "run",
        "max-num-iterations": str(steps),
        "optimizers.network.scheduler.max-steps": str(steps),
        "steps-per-save": str(max(1, steps // PARTS)),
        "save-only-latest-checkpoint": "False",
        "steps-per-eval-batch": "0",
        "steps-per-eval-image": "0",
        "steps-per-eval-all-images": "0",
    }


def _command(method: str, options: dict[str, str]) -> list[str]:
    program = str(Path(sys.executable).parent / "ns-train")
    return [program, method, *(part for name, value in options.items() for part in (f"--{name}", *shlex.split(value)))]


def _begin(command: Sequence[str]) -> dict[str, Any]:
    """What is known of a run of ns-train before it starts."""
    return {
        "command": shlex.join(["ns-train", *command[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "code": code_version(),
    }


def _run(command: Sequence[str], session: dict[str, Any], log: Path, threads: int, lock: int, tick: Tick) -> None:
    """Runs a command to its end, and adds to its session how that went; if this process is told to end, so is it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    with log.open("a") as output:
        output.write(f"\n$ {session['command']}\n")
        output.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=environment, pass_fds=(lock,))
        try:
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                tick(time.perf_counter() - start)
                time.sleep(0.2)
        except BaseException:
            process.terminate()
            ended = os.wait4(process.pid, 0)
            raise
        finally:
            _, status, usage = ended
            process.returncode = session["status"] = os.waitstatus_to_exitcode(status)
            session["wall_seconds"] = time.perf_counter() - start
            session["cpu_seconds"] = usage.ru_utime + usage.ru_stime


def _check(session: dict[str, Any], variant: str, log: Path) -> None:
    if session["status"] != 0:
        lines = "\n".join(log.read_text("utf8", errors="replace").splitlines()[-12:])
        raise TrainingError(
            f"{variant}: ns-train ended with status {session['status']}; all that it said is in {log}. Its last "
            f"lines:\n{lines}"
        )
