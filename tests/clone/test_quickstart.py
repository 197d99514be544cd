"""What scripts/quickstart.sh calls, with programs that only write down how they were called."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/quickstart.sh"
RUN = "outputs/{}/efficient-lvsm-plus-tiny/run"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout in which nothing is installed and every program succeeds."""
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "elvsm", "ns-train", "ns-eval", "ns-render", "ffmpeg"):
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/calls"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").write_text("")
    (tmp_path / "scripts/quickstart.sh").write_text(SCRIPT.read_text())
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/efficient-lvsm-plus-tiny.safetensors").touch()
    return tmp_path


def calls(checkout: Path, *arguments: str) -> list[str]:
    (checkout / "calls").unlink(missing_ok=True)
    subprocess.run(["bash", checkout / "scripts/quickstart.sh", *arguments], check=True, capture_output=True)
    return (checkout / "calls").read_text().splitlines()


def of(program: str, listed: list[str]) -> list[str]:
    return [call for call in listed if call.startswith(program)]


def test_the_shipped_model_is_used_and_a_run_of_it_reused_until_there_is_another_one(checkout):
    listed = calls(checkout)
    assert "--splits test" in listed[0] and not of("ns-train efficient", listed)
    (made,) = of("elvsm run", listed)
    assert "--weights pretrained --data data/objects128_test" in made
    (evaluated,) = of("ns-eval", listed)
    config = checkout / RUN.format("quickstart") / "config.yml"
    assert f"--load-config {config.relative_to(checkout)}" in evaluated and of("ns-render camera-path", listed)

    config.parent.mkdir(parents=True)
    config.touch()
    assert not of("elvsm run", calls(checkout))
    weights = checkout / "assets/efficient-lvsm-plus-tiny.safetensors"
    os.utime(weights, (config.stat().st_mtime + 10,) * 2)
    assert of("elvsm run", calls(checkout)) and not config.exists()


def test_an_interrupted_training_goes_on_and_a_finished_one_is_reused(checkout):
    (trained,) = of("ns-train efficient", calls(checkout, "--train"))
    assert (
        trained.startswith("ns-train efficient-lvsm-plus-tiny --data data/objects128 ") and "--load-dir" not in trained
    )
    checkpoints = checkout / RUN.format("quickstart-train") / "nerfstudio_models"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-000000300.ckpt").touch()
    (resumed,) = of("ns-train efficient", calls(checkout, "--train"))
    assert resumed == f"{trained} --load-dir {checkpoints.relative_to(checkout)}"
    (checkpoints / "step-000000999.ckpt").touch()
    assert not of("ns-train efficient", calls(checkout, "--train"))


def test_gaussians_are_fitted_with_the_run_and_fitted_again_with_another(checkout):
    run = RUN.format("quickstart")
    listed = calls(checkout)
    (fitted,) = of("ns-train splatfacto-lvsm", listed)
    assert f"--pipeline.datamanager.weights {run} " in f"{fitted} "
    paths = [call.split("--camera-path-filename ")[1].split()[0] for call in of("ns-render camera-path", listed)]
    assert len(paths) == 2 and paths[0] == paths[1], "both fly the same orbit"

    record = checkout / "outputs/quickstart/splatfacto-lvsm/run/fit.json"
    for file in (checkout / run / "config.yml", record):
        file.parent.mkdir(parents=True)
        file.touch()
    os.utime(record, (record.stat().st_mtime + 10,) * 2)
    assert not of("ns-train", calls(checkout))
    os.utime(record, (1, 1))
    assert of("ns-train splatfacto-lvsm", calls(checkout)) and not record.exists()


def test_other_options_are_refused(checkout):
    done = subprocess.run(["bash", checkout / "scripts/quickstart.sh", "--tarin"], capture_output=True, text=True)
    assert done.returncode == 2 and "found --tarin; expected nothing, or --train" in done.stderr
    assert not (checkout / "calls").exists()
