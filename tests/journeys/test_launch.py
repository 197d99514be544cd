"""Training as torchrun starts it: one process in place here, two that are killed and started again over gloo."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import TINY_NETWORK
from test_resume import assert_equal
from tiny_training import no_writers_are_left  # noqa: F401

from elvsm_nerfstudio import launch
from elvsm_nerfstudio.programs import running_program
from elvsm_nerfstudio.training.checkpoints import CheckpointError, list_checkpoints, read_checkpoint

OPTIONS = [
    "efficient-lvsm-tiny", *TINY_NETWORK, "--machine.device-type", "cpu", "--vis", "tensorboard",
    "--steps-per-save", "2", "--ema-decay", "0.9", "--pipeline.datamanager.num-workers", "0",
    "--save-only-latest-checkpoint", "False",
]  # fmt: skip


def checkpoints(outputs: Path) -> list[Path]:
    return list_checkpoints(next(outputs.rglob("nerfstudio_models")))


@pytest.fixture
def torchrun(monkeypatch):
    """The environment that torchrun gives to the only process of a run."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr(launch.comms, "LOCAL_PROCESS_GROUP", None)
    return monkeypatch


def test_a_named_run_goes_on_and_ends(torchrun, collection, tmp_path, capsys):
    command = [*OPTIONS, "--data", str(collection), "--output-dir", str(tmp_path), "--timestamp", "mine"]
    launch.main([*command, "--max-num-iterations", "5"])
    first = checkpoints(tmp_path)
    assert [path.name for path in first] == ["step-000000002.ckpt", "step-000000004.ckpt"]
    first[-1].write_bytes(first[-1].read_bytes()[:-100])  # as if the disk had been full
    launch.main([*command, "--max-num-iterations", "6"])
    assert checkpoints(tmp_path)[-1].name == "step-000000005.ckpt"
    assert "step-000000002.ckptwithiteration3of6" in "".join(capsys.readouterr().out.split())
    launch.main([*command, "--max-num-iterations", "6"])
    assert "isatitsend,6iterations" in "".join(capsys.readouterr().out.split())


def test_without_a_name_only_a_restart_goes_on(torchrun, collection, tmp_path):
    command = [*OPTIONS, "--data", str(collection), "--output-dir", str(tmp_path), "--max-num-iterations"]
    launch.main([*command, "1"])
    with pytest.raises(CheckpointError, match="is a run already, with step-000000000.ckpt"):
        launch.main([*command, "2"])
    launch.dist.destroy_process_group()
    torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    launch.main([*command, "2"])
    assert checkpoints(tmp_path)[-1].name == "step-000000001.ckpt"


def test_what_torchrun_cannot_start_is_said(torchrun):
    with pytest.raises(SystemExit, match="found the method nerfacto; expected a method that trains a network"):
        launch.main(["nerfacto"])
    torchrun.delenv("LOCAL_RANK")
    with pytest.raises(SystemExit, match="found no LOCAL_RANK in the environment; expected to be started by torchrun"):
        launch.main(OPTIONS)


def test_a_restart_reads_nothing_that_processes_before_it_have_left(torchrun):
    """One store serves all starts: addresses in it may be of processes that are gone."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    torchrun.setenv("MASTER_PORT", str(store.port))
    for start in ("0", "1"):
        torchrun.setenv("TORCHELASTIC_RESTART_COUNT", start)
        launch._join("gloo")
        left = dist.distributed_c10d._get_default_store()
        assert not left.check(["address"])
        left.set("address", "of a process of this start")
        assert left.check(["address"])
        dist.destroy_process_group()


def test_errors_of_its_user_end_it_as_they_end_ns_train(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/elvsm_nerfstudio/launch.py", "efficient-lvsm"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="elvsm_nerfstudio.launch"))
    assert running_program() == "ns-train"


@pytest.mark.slow
def test_a_killed_process_changes_nothing(collection, tmp_path):
    """Weights, averaged weights and moments, bit for bit, where one of two processes dies and both start again."""
    command = [
        sys.executable, str(Path(__file__).parents[1] / "torchrun_launcher.py"), str(tmp_path), *OPTIONS,
        "--data", str(collection), "--max-num-iterations", "6",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = "".join(done.stdout.split())
    assert said.count("Goingonfrom") == 2 and said.count("step-000000002.ckptwithiteration3of6") == 2
    straight, killed = (checkpoints(tmp_path / name) for name in ("straight", "killed"))
    assert [path.name for path in killed] == [path.name for path in straight]
    assert killed[-1].name == "step-000000005.ckpt"
    assert_equal(read_checkpoint(killed[-1]), read_checkpoint(straight[-1]))
