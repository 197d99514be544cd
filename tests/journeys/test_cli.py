"""The journeys of a user through nerfstudio's own programs, on tiny data and a tiny network."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_NETWORK, need_shared, run_cli, write_collection
from PIL import Image


def train(cwd: Path, data: Path, name: str, steps: int, *options: str) -> Path:
    """Trains and returns the run's folder."""
    run_cli(
        "ns-train", "efficient-lvsm-tiny", *TINY_NETWORK, "--data", str(data), "--machine.device-type", "cpu",
        "--vis", "tensorboard", "--max-num-iterations", str(steps), "--output-dir", "outputs",
        "--experiment-name", name, "--timestamp", "run", "--steps-per-eval-image", "4", *options, cwd=cwd,
    )  # fmt: skip
    return cwd / "outputs" / name / "efficient-lvsm-tiny" / "run"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def run(workspace, collection) -> Path:
    return train(workspace, collection, "straight", 6)


def test_training_is_logged(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("Train Loss Dict/mse", "Train Metrics Dict/psnr", "gradient_norm/network", "skipped_steps/network",
                 "Train Metrics Dict/skipped_scenes", "learning_rate/network", "Eval Images Metrics/psnr"):  # fmt: skip
        assert name in scalars, scalars
    assert "Eval Images/views" in events.Tags()["images"]
    rates = [event.value for event in events.Scalars("learning_rate/network")]
    assert rates[0] == pytest.approx(5e-4 * 2 / 100)


def test_a_run_is_plotted(workspace, run):
    run_cli("elvsm", "plot", "--runs", str(run), "--output", "curve.png", cwd=workspace)
    curves = json.loads((workspace / "curve.json").read_text())
    assert list(curves) == ["training batches"] and curves["training batches"][0]["step"] == 0
    assert Image.open(workspace / "curve.png").size == (1100, 396)


def test_runs_are_compared_on_validation_scenes(workspace, collection):
    run = train(workspace, collection, "evaluated", 3, "--steps-per-eval-all-images", "2")
    other = shutil.copytree(run, workspace / "outputs" / "other" / run.parent.name / run.name)
    plot = ["elvsm", "plot", "--output", "curves.png", "--runs", str(run)]
    run_cli(*plot, str(other), cwd=workspace)
    curves = json.loads((workspace / "curves.json").read_text())
    assert list(curves) == ["evaluated", "copying the nearest context view", "other"]
    assert [row["step"] for row in curves["evaluated"]] == [2] and curves["evaluated"] == curves["other"]
    assert "two are named evaluated" in run_cli(*plot, str(run), cwd=workspace, check=False).stderr


def test_evaluation_twice_gives_the_same_json(workspace, run):
    for name in ("first", "second"):
        done = run_cli(
            "ns-eval", "--load-config", str(run / "config.yml"), "--output-path", f"{name}.json",
            "--render-output-path", f"{name}_pictures", cwd=workspace,
        )  # fmt: skip
        assert done.stdout.count("Metrics of every image") == 1
        assert f"{name}.images.json and {name}_pictures/metrics.images.json" in done.stdout
    first, second = ((workspace / f"{name}.json").read_text() for name in ("first", "second"))
    assert first == second

    def refuse(token: str):
        raise AssertionError(f"{token} is not JSON")

    results = json.loads(first, parse_constant=refuse)["results"]
    assert results["num_scenes"] == 2 and results["num_images"] == 6
    images = json.loads((workspace / "first.images.json").read_text(), parse_constant=refuse)
    assert results["psnr"] == pytest.approx(np.mean([row["psnr"] for row in images["images"]]))
    assert images["timing"]["by_context_views"]["2"]["encode_ms"]["median"] > 0
    assert results["record"] == images["record"] and results["record"]["protocol"]["name"] == "as configured"
    assert {path.name for path in (workspace / "first_pictures").glob("*.png")} == {"scene_5.png", "scene_6.png"}


def test_protocols_are_scored_by_ns_eval_on_runs_made_from_another(workspace, run, chunks):
    """One training, two protocols, one of them on other data than trained on."""
    make_run = "elvsm", "run", "--from-run", str(run / "config.yml")
    options = ("--protocol", "re10k-2view-256-context-frame", "--data", str(chunks))
    config = run_cli(*make_run, *options, cwd=workspace).stdout.strip().splitlines()[-1]
    name = "straight-re10k-re10k-2view-256-context-frame"
    assert Path(config) == workspace / "outputs" / name / "efficient-lvsm-tiny/run/config.yml"
    run_cli("ns-eval", "--load-config", config, "--output-path", "re10k.json", cwd=workspace)
    results = json.loads((workspace / "re10k.json").read_text())["results"]
    assert results["num_scenes"] == 2 and results["record"]["protocol"]["image_size"] == [256, 256]

    again = run_cli(*make_run, *options, cwd=workspace, check=False)
    assert again.returncode != 0 and "exists already; choose another --name" in again.stderr
    wrong = run_cli(*make_run, "--protocol", "objects", cwd=workspace, check=False)
    assert wrong.returncode != 0 and "did you mean objects-4view" in wrong.stderr

    number = run_cli(*make_run, "--num-context-views", "1", "--name", "one", cwd=workspace, check=False)
    assert number.returncode != 0 and "evaluation_index.json says what the context of each scene is" in number.stderr
    config = run_cli(*make_run, "--name", "one", cwd=workspace).stdout.splitlines()[-1]
    run_cli("ns-eval", "--load-config", config, "--output-path", "one.json", cwd=workspace)
    record = json.loads((workspace / "one.json").read_text())["results"]["record"]
    assert record["protocol"]["name"] == "as configured" and record["data"]["num_scenes"] == 2


def test_chunks_are_trained_on_with_a_bounded_gap_and_any_number_of_views(workspace, chunks):
    options = "--pipeline.datamanager.view-sampler", "bounded-gap", "--pipeline.datamanager.frame-gap", "4", "6"
    run = train(workspace, chunks, "chunks", 3, "--pipeline.datamanager.num-context-views", "1", "3", *options)
    assert (run / "nerfstudio_models/step-000000002.ckpt").exists() and not (run / "skipped_scenes.json").exists()


def test_skipped_scenes_are_counted_and_listed(workspace):
    data = write_collection(workspace / "spoilt", "train train train val test")
    for image in (data / "scene_1" / "images").iterdir():
        image.write_bytes(b"")
    run = train(workspace, data, "spoilt", 4, "--pipeline.datamanager.num-workers", "0")
    skipped = json.loads((run / "skipped_scenes.json").read_text())
    assert sum(skipped.values()) >= 2 and all("scene_1" in reason for reason in skipped)


def test_camera_path_is_rendered(workspace, run):
    orbit = workspace / "orbit.json"
    # The context cameras of this scene stand around it; those of the first do not.
    around = "--scene", "scene_6", "--name", "around"
    made = run_cli("elvsm", "run", "--from-run", str(run / "config.yml"), *around, cwd=workspace)
    options = "--load-config", made.stdout.split()[-1]
    run_cli("elvsm", "orbit", *options, "--output", str(orbit), "--seconds", "1", "--fps", "3",
            "--size", "21", "35", cwd=workspace)  # fmt: skip
    run_cli("ns-render", "camera-path", *options, "--camera-path-filename", str(orbit), "--output-path", "orbit.mp4",
            "--output-format", "images", "--image-format", "png", cwd=workspace)  # fmt: skip
    frames = [np.array(Image.open(path)) for path in sorted((workspace / "orbit").glob("*.png"))]
    assert len(frames) == 3 and all(frame.shape == (21, 35, 3) for frame in frames)
    assert not np.array_equal(frames[0], frames[1])


@pytest.mark.parametrize(
    "command, frames",
    [(["interpolate", "--pose-source", "train", "--interpolation-steps", "4"], 4),
     (["spiral", "--seconds", "0.2"], 4)],
    ids=["interpolate", "spiral"],
)  # fmt: skip
def test_paths_between_and_around_views_are_rendered(workspace, run, command, frames):
    import mediapy

    video = f"{command[0]}.mp4"
    run_cli("ns-render", *command, "--load-config", str(run / "config.yml"), "--output-path", video, cwd=workspace)
    shown = mediapy.read_video(workspace / video)
    assert len(shown) >= frames and shown[0].std() > 0


def test_dataset_is_rendered_and_scored_alike(workspace, run):
    """ns-render's pictures are those that ns-eval scored."""
    run_cli("ns-render", "dataset", "--load-config", str(run / "config.yml"), "--output-path", "renders",
            "--image-format", "png", "--split", "train+test", cwd=workspace)  # fmt: skip
    renders = workspace / "renders/test"
    assert sorted(path.name for path in renders.iterdir()) == ["gt-rgb", "rgb"]
    assert sorted(path.name for path in (renders / "rgb").iterdir()) == ["001.png", "005.png", "006.png"]
    assert len(list((workspace / "renders/train/rgb").iterdir())) == 2
    rgb, truth = (np.array(Image.open(renders / kind / "005.png"), dtype=float) / 255 for kind in ("rgb", "gt-rgb"))
    run_cli("ns-eval", "--load-config", str(run / "config.yml"), "--output-path", "scored.json", cwd=workspace)
    rows = json.loads((workspace / "scored.images.json").read_text())["images"]
    (row,) = [row for row in rows if (row["scene"], row["image"]) == ("scene_5", "005")]
    assert -10 * np.log10(((rgb - truth) ** 2).mean()) == pytest.approx(row["psnr"], abs=0.05)


def test_one_capture_of_real_photos(workspace):
    run = train(workspace, need_shared("data/fox"), "fox", 2)
    run_cli("ns-eval", "--load-config", str(run / "config.yml"), "--output-path", "fox.json", cwd=workspace)
    results = json.loads((workspace / "fox.json").read_text())["results"]
    assert results["num_images"] == 5 and results["num_scenes"] == 1 and results["psnr"] > 3


def test_bad_data_stops_with_the_reason(workspace):
    result = run_cli(
        "ns-train", "efficient-lvsm-tiny", "--data", "nowhere", "--machine.device-type", "cpu", "--vis", "tensorboard",
        cwd=workspace, check=False,
    )  # fmt: skip
    assert result.returncode != 0 and result.stderr.startswith("error: --data nowhere does not exist")
    assert "Traceback" not in result.stdout + result.stderr


def test_python_of_the_tests_is_that_of_the_programs():
    assert (Path(sys.executable).parent / "ns-train").exists(), "nerfstudio is not installed in this environment"
