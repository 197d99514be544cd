"""Training that is stopped and goes on, accumulated steps, and what a run writes down."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from conftest import TINY_NETWORK, run_cli
from nerfstudio.engine.trainer import Trainer
from tiny_training import gradients, no_writers_are_left, tiny_trainer  # noqa: F401

from elvsm_nerfstudio.training.checkpoints import CheckpointError, find_checkpoint, list_checkpoints, read_checkpoint

OPTIONS = [
    *TINY_NETWORK, "--machine.device-type", "cpu", "--output-dir", "outputs", "--timestamp", "run",
    "--max-num-iterations", "6", "--steps-per-save", "2", "--steps-per-eval-image", "4", "--ema-decay", "0.9",
    "--save-only-latest-checkpoint", "False", "--pipeline.datamanager.num-workers", "0", "--logging.steps-per-log", "1",
]  # fmt: skip


def command(data: Path, name: str, *options: str) -> list[str]:
    return ["ns-train", "efficient-lvsm-tiny", *OPTIONS, "--data", str(data), "--experiment-name", name, *options]


def models(cwd: Path, name: str) -> Path:
    return cwd / "outputs" / name / "efficient-lvsm-tiny" / "run" / "nerfstudio_models"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def straight(workspace, collection) -> Path:
    """The checkpoints of six iterations in one go."""
    run_cli(*command(collection, "straight", "--vis", "tensorboard"), cwd=workspace)
    return models(workspace, "straight")


def kill_after(checkpoint: Path, arguments: list[str], cwd: Path) -> None:
    """Runs one of nerfstudio's programs and ends it, with no time to say anything, once a checkpoint is there."""
    program = [str(Path(sys.executable).parent / arguments[0]), *arguments[1:]]
    log = cwd / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(program, cwd=cwd, stdout=output, stderr=output)
    while not checkpoint.exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def assert_equal(one, other, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where


def test_six_iterations_are_three_a_kill_and_three_bit_for_bit(workspace, collection, straight):
    """Weights, averaged weights, moments, schedule and counts. The data's position is the iteration's number."""
    killed = models(workspace, "killed")
    options = "--vis", "tensorboard", "--max-num-iterations", "1000"
    kill_after(killed / "step-000000002.ckpt", command(collection, "killed", *options), workspace)
    # Who decodes images makes no difference either.
    workers = "--pipeline.datamanager.num-workers", "1"
    resume = "--load-dir", str(killed), "--load-step", "2", "--vis", "wandb", *workers
    run_cli(*command(collection, "resumed", *resume), cwd=workspace)
    resumed = models(workspace, "resumed")
    assert [path.name for path in list_checkpoints(resumed)] == ["step-000000004.ckpt", "step-000000005.ckpt"]
    one, other = (read_checkpoint(folder / "step-000000005.ckpt") for folder in (straight, resumed))
    assert one["average"]["updates"] == 6 and len(one["pipeline"]) > 20
    assert_equal(one, other)
    config = (resumed.parent / "config.yml").read_text()
    assert config.startswith(f"# resumed from {killed}\n") and "load_step: null" in config

    offline = list((resumed.parent / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    logged = b"".join(path.read_bytes() for path in offline[0].glob("*.wandb"))
    for name in (b"Train Loss Dict/mse", b"throughput/tokens_per_second", b"throughput/data_wait_seconds",
                 b"peak_memory_MiB/host", b"nonfinite_steps/network", b"Eval Images/views"):  # fmt: skip
        assert name in logged, name


def test_a_run_is_logged_to_tensorboard(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight.parent))
    events.Reload()

    def values(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    for name in ("Train Loss Dict/mse", "Train Metrics Dict/psnr", "gradient_norm/network", "learning_rate/network"):
        assert sorted(values(name)) == list(range(6)) and all(value > 0 for value in values(name).values()), name
    assert values("skipped_steps/network")[5] == values("nonfinite_steps/network")[5] == 0
    scenes, tokens = values("throughput/scenes_per_second"), values("throughput/tokens_per_second")
    # 2 + 2 views of 2 x 2 tokens.
    assert sorted(scenes) == list(range(1, 6)) and all(
        tokens[step] == pytest.approx(16 * scenes[step]) for step in scenes
    )
    assert 50 < values("peak_memory_MiB/host")[5] < 10_000
    assert "Eval Images Metrics/psnr" in events.Tags()["scalars"]
    (picture,) = events.Images("Eval Images/views")
    # Context, targets, predictions and errors below each other, two of 16 pixels side by side.
    assert (picture.step, picture.height, picture.width) == (4, 4 * 20 - 4, 2 * 20 - 4)


def test_a_damaged_latest_checkpoint_stops_evaluation_with_the_way_out(workspace, straight):
    latest = straight / "step-000000005.ckpt"
    whole = latest.read_bytes()
    latest.write_bytes(whole[:-1000])
    config = straight.parent / "config.yml"
    result = run_cli("ns-eval", "--load-config", str(config), "--output-path", "x.json", cwd=workspace, check=False)
    latest.write_bytes(whole)
    said = " ".join(result.stderr.split())
    assert result.returncode != 0 and "step-000000005.ckpt is damaged" in said
    assert "step-000000004.ckpt, is whole" in said and not (workspace / "x.json").exists()


def test_runs_are_loaded_with_averaged_weights_and_also_those_from_before_the_trainer(workspace, straight, monkeypatch):
    from nerfstudio.engine.trainer import TrainerConfig
    from nerfstudio.utils.eval_utils import eval_setup

    monkeypatch.chdir(workspace)
    path = straight.parent / "config.yml"
    saved = read_checkpoint(straight / "step-000000005.ckpt")
    text = path.read_text()
    old = text.replace("elvsm_nerfstudio.trainer.EfficientLVSMTrainer", "nerfstudio.engine.trainer.Trainer")
    old = old.replace("ema_decay: 0.9\n", "")
    assert old.count("nerfstudio.engine.trainer.Trainer") == 2 and "elvsm_nerfstudio.trainer" not in old
    (workspace / "old.yml").write_text(old)
    for file in (path, workspace / "old.yml"):
        config, pipeline, _, step = eval_setup(file)
        assert isinstance(config, TrainerConfig) and step == 5
        for name, tensor in pipeline.model.network.state_dict().items():
            assert torch.equal(tensor, saved["pipeline"][f"_model.network.{name}"])
            assert torch.equal(tensor, saved["average"]["trained"][name]) == ("device_indicator" in name)


# In this process


def test_accumulated_batches_give_the_gradient_and_the_step_of_one_large_batch(tmp_path, collection):
    large = tiny_trainer(tmp_path / "large", collection, scenes_per_batch=4)
    small = tiny_trainer(
        tmp_path / "small", collection, gradient_accumulation_steps={"network": 2}, max_num_iterations=10
    )
    for step in range(2):
        large.train_iteration(step)
        small.train_iteration(2 * step)
        unmoved = small.optimizers.schedulers["network"].last_epoch
        small.train_iteration(2 * step + 1)
        assert unmoved == step and small.optimizers.schedulers["network"].last_epoch == step + 1
        for name, gradient in gradients(large).items():
            assert (gradient - gradients(small)[name]).abs().max() < 1e-6 * max(1, gradient.abs().max()), name
        if step == 0:
            norms = [t.optimizers.optimizers["network"].gradient_norm for t in (large, small)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_a_step_that_was_broken_off_is_begun_again(tmp_path, collection):
    options = dict(gradient_accumulation_steps={"network": 2}, max_num_iterations=6)
    straight = tiny_trainer(tmp_path / "straight", collection, **options)
    for step in range(4):
        straight.train_iteration(step)
        if step == 2:
            straight.save_checkpoint(2)
    resumed = tiny_trainer(tmp_path / "resumed", collection, load_dir=straight.checkpoint_dir, **options)
    assert resumed._start_step == 2
    for step in (2, 3):
        resumed.train_iteration(step)
    assert_equal(*(trainer._state(3) for trainer in (straight, resumed)))


@pytest.mark.parametrize(
    "options, message",
    [({"gradient_accumulation_steps": {"netwrok": 2}}, "expected the same number, .* groups network"),
     ({"gradient_accumulation_steps": {"network": 3}}, "--max-num-iterations 10000: expected a multiple of the 3"),
     ({"mixed_precision": True}, "--mixed-precision True: expected False; precision is the model's own")],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(tmp_path, collection, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, collection, **options)


def test_iterations_count_from_the_beginning(tmp_path, collection):
    first = tiny_trainer(tmp_path, collection, max_num_iterations=2)
    first.train()
    assert [path.name for path in list_checkpoints(first.checkpoint_dir)] == ["step-000000001.ckpt"]
    with pytest.raises(ValueError, match="--max-num-iterations 2: .*step-000000001.ckpt has 2 behind it"):
        tiny_trainer(tmp_path, collection, max_num_iterations=2, load_dir=first.checkpoint_dir)
    second = tiny_trainer(tmp_path, collection, max_num_iterations=3, load_dir=first.checkpoint_dir)
    second.train()
    assert [path.name for path in list_checkpoints(first.checkpoint_dir)] == ["step-000000002.ckpt"]


def subtracting_train(self: Trainer) -> None:
    """nerfstudio's main branch, which also calls itself 1.1.5: there ``max_num_iterations`` is the total."""
    self.config = replace(self.config, max_num_iterations=self.config.max_num_iterations - self._start_step)
    released_train(self)


released_train = Trainer.train


@pytest.mark.parametrize("newer", [False, True], ids=["nerfstudio 1.1.5", "nerfstudio's main branch"])
def test_a_run_goes_on_to_its_end_whatever_nerfstudio_counts(tmp_path, collection, monkeypatch, newer):
    if newer:
        monkeypatch.setattr(Trainer, "train", subtracting_train)
    first = tiny_trainer(tmp_path, collection, max_num_iterations=6, steps_per_save=100)
    first.train()
    folder = first.checkpoint_dir
    for start, total in ((6, 14), (14, 15)):
        resumed = tiny_trainer(tmp_path, collection, max_num_iterations=total, load_dir=folder, steps_per_save=100)
        iteration = Mock(side_effect=resumed.train_iteration)
        monkeypatch.setattr(resumed, "train_iteration", iteration)
        resumed.train()
        assert iteration.mock_calls == [call(step) for step in range(start, total)]
        (saved,) = list_checkpoints(folder)
        assert saved.name == f"step-{total - 1:09d}.ckpt" and read_checkpoint(saved)["step"] == total - 1


def test_what_was_loaded_is_never_replaced_by_less(tmp_path, collection):
    trainer = tiny_trainer(tmp_path, collection, max_num_iterations=9, save_only_latest_checkpoint=False)
    for step in range(8):
        trainer.train_iteration(step)
        trainer.save_checkpoint(step)
    resumed = tiny_trainer(tmp_path, collection, max_num_iterations=9, load_dir=trainer.checkpoint_dir, load_step=5)
    resumed.save_checkpoint(0)  # as a loop of no iterations asks for
    # Later ones are of another training: whoever goes back to step 5 keeps them.
    assert [int(path.stem[-1]) for path in list_checkpoints(trainer.checkpoint_dir)] == [5, 6, 7]
    assert read_checkpoint(find_checkpoint(trainer.checkpoint_dir, 5))["step"] == 5


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_cosine_ends_with_the_run(tmp_path, collection, accumulated):
    options = dict(max_num_iterations=12, gradient_accumulation_steps={"network": accumulated})
    trainer = tiny_trainer(tmp_path, collection, **options)
    scheduler = trainer.config.optimizers["network"]["scheduler"]
    assert scheduler.max_steps == 12 // accumulated
    given = {"network": {**trainer.config.optimizers["network"], "scheduler": replace(scheduler, max_steps=8)}}
    with pytest.raises(
        ValueError, match=rf"network.scheduler.max-steps 8: expected {12 // accumulated}, the optimiser"
    ):
        tiny_trainer(tmp_path, collection, optimizers=given, **options)


def test_a_save_that_fails_is_reported_and_training_goes_on(tmp_path, collection, monkeypatch, capsys):
    trainer = tiny_trainer(tmp_path, collection, max_num_iterations=4)
    trainer.save_checkpoint(0)
    assert list_checkpoints(trainer.checkpoint_dir) == []  # nothing was trained
    trainer.train_iteration(0)
    trainer.save_checkpoint(0)
    trainer.train_iteration(1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    trainer.save_checkpoint(1)
    said = "".join(capsys.readouterr().out.split())  # broken into lines anywhere
    assert "step-000000001.ckptcouldnotbewritten:[Errno28]Nospaceleftondevice" in said
    assert "step-000000000.ckpt,isintact" in said and "Traininggoeson" in said
    assert [path.name for path in list_checkpoints(trainer.checkpoint_dir)] == ["step-000000000.ckpt"]
    trainer.training_state = "completed"
    with pytest.raises(CheckpointError, match="could not be written"):
        trainer.save_checkpoint(2)


def test_a_full_disk_stops_the_run_before_it_begins(tmp_path, collection, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 100_000))
    with pytest.raises(CheckpointError, match=r"0.1 MiB are free on its disk, .* needed for a checkpoint beside"):
        tiny_trainer(tmp_path, collection)
    with pytest.raises(CheckpointError, match=r"needed for 5 checkpoints \(--save-only-latest-checkpoint False\)"):
        tiny_trainer(tmp_path, collection, save_only_latest_checkpoint=False)
