"""Checkpoints on disk: whole or not at all."""

import os
import resource
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elvsm_nerfstudio.method_configs import efficient_lvsm_tiny
from elvsm_nerfstudio.training.checkpoints import (
    PARTIAL,
    CheckpointError,
    check_checkpoint,
    check_space,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((50_000,), float(step))}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of steps 2 and 4."""
    models = tmp_path / "run" / "nerfstudio_models"
    for step in (2, 4):
        write_checkpoint(checkpoint_path(models, step), state(step))
    return models


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_written_is_read_and_the_latest_is_found(folder):
    assert [path.name for path in list_checkpoints(folder)] == ["step-000000002.ckpt", "step-000000004.ckpt"]
    read = read_checkpoint(find_checkpoint(folder))
    assert read["step"] == 4 and torch.equal(read["weights"], state(4)["weights"])
    assert read_checkpoint(find_checkpoint(folder, 2))["step"] == 2
    assert not (folder / PARTIAL).exists()
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has those of 2, 4"):
        find_checkpoint(folder, 3)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(folder.parent)


@pytest.mark.parametrize("damage", [truncate, spoil])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_offered(folder, damage):
    damage(checkpoint_path(folder, 4))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(find_checkpoint(folder))
    assert f"{folder}/step-000000004.ckpt is damaged" in str(error.value)
    assert f"--load-checkpoint {folder}/step-000000002.ckpt" in str(error.value)
    assert f"mv {folder}/step-000000004.ckpt {folder.parent}" in str(error.value)
    damage(checkpoint_path(folder, 2))
    with pytest.raises(CheckpointError, match="there is no whole one before it"):
        check_checkpoint(find_checkpoint(folder))


@pytest.mark.parametrize("moment", ["in the middle of writing", "before it is renamed"])
def test_killed_while_writing_the_one_before_stays(folder, moment):
    victim = "torch.save" if moment == "in the middle of writing" else "os.replace"
    code = (
        "import os, signal, torch\n"
        "from pathlib import Path\n"
        "from elvsm_nerfstudio.training.checkpoints import write_checkpoint\n"
        "def die(state, file, *_):\n"
        "    if hasattr(file, 'write'):\n"
        "        file.write(bytes(100000)); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{victim} = die\n"
        f"write_checkpoint(Path({str(checkpoint_path(folder, 6))!r}), {{'step': 6, 'weights': torch.zeros(9)}})\n"
    )
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert (folder / PARTIAL).exists()
    # As nerfstudio looks for the latest one.
    steps = sorted(int(name[name.find("-") + 1 : name.find(".")]) for name in os.listdir(folder))
    assert steps[-1] == 4 and read_checkpoint(find_checkpoint(folder))["step"] == 4
    write_checkpoint(checkpoint_path(folder, 6), state(6))
    assert not (folder / PARTIAL).exists() and read_checkpoint(find_checkpoint(folder))["step"] == 6


def test_a_full_disk_leaves_the_one_before_and_says_so(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            write_checkpoint(checkpoint_path(folder, 6), state(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000000006.ckpt could not be written: [Errno 27] File too large" in str(error.value)
    assert f"The one before, {folder}/step-000000004.ckpt, is intact" in str(error.value)
    assert sorted(os.listdir(folder)) == ["step-000000002.ckpt", "step-000000004.ckpt"]
    assert read_checkpoint(find_checkpoint(folder))["step"] == 4


def test_what_was_written_is_read_back_before_it_takes_its_name(folder, monkeypatch):
    save = torch.save

    def lie(state, file):
        save(state, file)
        file.flush()
        spoil(Path(file.name))

    monkeypatch.setattr(torch, "save", lie)
    with pytest.raises(CheckpointError, match="000000006.ckpt could not be written: read back, it is damaged"):
        write_checkpoint(checkpoint_path(folder, 6), state(6))
    assert sorted(os.listdir(folder)) == ["step-000000002.ckpt", "step-000000004.ckpt"]


def test_too_little_room_is_known_beforehand(folder):
    check_space(folder / "not there yet", 1, "a checkpoint")
    with pytest.raises(CheckpointError, match="MiB are needed for a checkpoint. Make room or choose another --output"):
        check_space(folder, 2**62, "a checkpoint")


def test_evaluation_looks_at_the_latest_checkpoint_first(tmp_path):
    config = replace(efficient_lvsm_tiny.config, output_dir=tmp_path, experiment_name="a", timestamp="run")
    models = config.get_checkpoint_dir()
    for step in (2, 4):
        write_checkpoint(checkpoint_path(models, step), state(step))
    assert config.get_checkpoint_dir() == models
    truncate(checkpoint_path(models, 4))
    with pytest.raises(CheckpointError, match="step-000000004.ckpt is damaged"):
        config.get_checkpoint_dir()
    assert replace(config, load_step=2).get_checkpoint_dir() == models
    # Resuming looks at what it loads.
    assert replace(config, load_checkpoint=checkpoint_path(models, 2)).get_checkpoint_dir() == models


def test_a_run_is_not_written_into_another_one_nor_to_where_nothing_can_be_written(tmp_path):
    config = replace(efficient_lvsm_tiny.config, output_dir=tmp_path, experiment_name="a", timestamp="run")
    config.save_config()
    assert (config.get_base_dir() / "config.yml").exists()
    models = config.get_checkpoint_dir()
    write_checkpoint(checkpoint_path(models, 4), state(4))
    before = (config.get_base_dir() / "config.yml").read_text()
    with pytest.raises(CheckpointError, match=f"is a run already.*--load-dir {models}"):
        replace(config, max_num_iterations=7).save_config()
    assert (config.get_base_dir() / "config.yml").read_text() == before
    replace(config, load_dir=models, load_step=4).save_config()
    after = (config.get_base_dir() / "config.yml").read_text()
    assert after == f"# resumed from {models}\n{before}"  # ns-eval would look for load_step

    other = deepcopy(config)
    other.pipeline.model.network.camera_encoding = "prope"  # of which checkpoints say nothing
    with pytest.raises(CheckpointError, match=f"{models} is of a run of .*'none'.*found options for .*'prope'"):
        replace(other, load_dir=models).save_config()
    with pytest.raises(CheckpointError, match=f"{models} is of a run of"):
        replace(other, load_checkpoint=checkpoint_path(models, 4)).save_config()
    assert (config.get_base_dir() / "config.yml").read_text() == after

    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="--output-dir .*file: .* cannot be written to"):
        replace(config, output_dir=tmp_path / "file").save_config()
