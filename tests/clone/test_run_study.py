"""scripts/study/run.py: its table of variants, plans, times, scores and tables, and a study from end to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline, write_collection
from test_compare import write_run
from torch.utils.tensorboard import SummaryWriter

from elvsm_nerfstudio.evaluation.baselines import copy_nearest
from elvsm_nerfstudio.evaluation.metrics import psnr

ROOT = Path(__file__).parents[2]
TINY = (
    "--pipeline.model.network.width 32 --pipeline.model.network.num-layers 2 --pipeline.model.network.head-dim 16 "
    "--pipeline.datamanager.image-size 16 16 --pipeline.datamanager.scenes-per-batch 2 "
    "--pipeline.datamanager.num-target-views 2 --pipeline.datamanager.num-context-views 2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A collection of tiny scenes; read only."""
    return write_collection(tmp_path_factory.mktemp("studied"))


def settings_of(data: Path, **changed):
    from scripts.study.layout import Settings

    options = dict(minutes=1.0, steps=16, threads=1, context_views=(1, 2, 4), num_target_views=2, train_options="")
    return Settings(str(data), **{**options, **changed})


def quiet(seconds: float) -> None:
    """Nobody watches."""


# The table of variants


def value_of(config, option: str):
    """An option of ns-train as a config has it."""
    for part in option.replace("-", "_").split("."):
        assert part in config if isinstance(config, dict) else hasattr(config, part), option
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def test_every_variant_is_of_a_registered_method_and_sets_what_it_has():
    from elvsm_nerfstudio.runs import network_methods
    from scripts.study.variants import SAME_FOR_ALL, VARIANTS

    methods = network_methods()
    for variant in VARIANTS:
        for option in {**SAME_FOR_ALL, **variant.options}:
            value_of(methods[variant.method], option)


def test_variants_differ_in_what_they_test_alone():
    from scripts.study.training import options_of
    from scripts.study.variants import VARIANTS

    options = {variant.name: options_of(settings_of(Path("data")), variant) for variant in VARIANTS}
    plus, paper = options["plus"], options["paper-exact"]
    assert options["prope"] == {**paper, "pipeline.model.network.camera-encoding": "prope"}
    rays = "pipeline.model.network.ray-frame"
    lens = {"pipeline.datamanager.lens-augmentation": "False"}
    assert options["plus-adamw"] == {**paper, **lens, "pipeline.model.psnr-loss": "False", rays: "canonical"}
    changed = {"optimizers.network.optimizer.lr": "3e-3", "optimizers.network.optimizer.muon": "True"}
    assert options["plus-muon"] == {**options["plus-adamw"], **changed}
    loss = {"pipeline.model.psnr-loss": "True"}
    assert options["plus-canonical-rays"] == {**options["plus-muon"], **loss}
    assert plus == {**options["plus-canonical-rays"], rays: "camera"}
    assert options["plus-prefix"] == {
        **plus, "pipeline.model.prefix-loss": "True", "pipeline.datamanager.num-context-views": "8 8",
    }  # fmt: skip


def test_plus_is_the_method_as_it_is_but_through_one_lens():
    from elvsm_nerfstudio.runs import network_methods
    from scripts.study.variants import SAME_FOR_ALL, find_variants

    (plus,) = find_variants(["plus"])
    config = network_methods()["efficient-lvsm-plus-tiny"]
    for option, expected in {**SAME_FOR_ALL, **plus.options}.items():
        found = value_of(config, option)
        if option == "pipeline.datamanager.lens-augmentation":
            assert (found, expected) == (True, "False")
            continue
        assert found == float(expected) if isinstance(found, float) else str(found) == expected, option


def test_an_unknown_variant_suggests_the_nearest(data, tmp_path):
    from scripts.study.run import Args, run_study

    with pytest.raises(ValueError, match="--variants plus-prefx: no such variant; did you mean plus-prefix?"):
        run_study(Args(data, tmp_path / "out", variants=("plus", "plus-prefx")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"context_views": (1, 2)}, "--context-views 1 2: expected numbers of at least 1, 4 among them"),
        ({"context_views": (4, 16)}, "scene scene_4 has 8 frames for context and 0 others"),
        ({"steps": 12}, "--steps 12: expected a multiple of 8"),
        ({"seeds": (1, 1)}, "--seeds 1 1: expected different numbers"),
        ({"minutes": 0.0}, "--minutes.*: expected numbers above 0"),
        ({"train_options": "--vis wandb"}, "--train-options --vis: the study sets it itself"),
        ({"train_options": "wandb"}, "--train-options: found 'wandb'; expected an option"),
    ],
)
def test_options_that_cannot_be_used_are_named_before_anything_runs(data, tmp_path, changed, message):
    from scripts.study.run import Args, run_study

    options = {"variants": ("plus",), "context_views": (1, 2, 4), **changed}
    with pytest.raises(ValueError, match=message):
        run_study(Args(data, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_study_goes_on_with_the_same_options_alone(data, tmp_path):
    from scripts.study.layout import Layout, keep_settings
    from scripts.study.run import Args, run_study
    from scripts.study.training import find_plan, make_plan
    from scripts.study.variants import find_variants

    layout, settings = Layout(tmp_path.resolve()), settings_of(data)
    keep_settings(layout, settings)
    keep_settings(layout, settings)
    with pytest.raises(ValueError, match="--num-target-views: .* holds a study with 2; expected the same, found 3"):
        keep_settings(layout, replace(settings, num_target_views=3))

    (plus,) = find_variants(["plus"])
    plan = make_plan(layout, settings, plus, 42, lock=-1, tick=quiet)
    assert find_plan(layout, settings, plus) == plan and plan.steps == 16
    with pytest.raises(ValueError, match="plus was trained there as efficient-lvsm-plus-tiny"):
        find_plan(layout, settings, replace(plus, options={"ema-decay": "0.9"}))

    # A row that is only reported is not to be one of other options either.
    (paper,) = find_variants(["paper-exact"])
    make_plan(layout, settings, replace(paper, options={"ema-decay": "0.9"}), 42, lock=-1, tick=quiet)
    with pytest.raises(ValueError, match="paper-exact was trained there as efficient-lvsm-tiny"):
        run_study(Args(data, tmp_path, ("plus",), steps=16, minutes=1.0, context_views=(1, 2, 4), num_target_views=2))


def test_two_studies_never_share_a_folder(tmp_path):
    from scripts.study.layout import Layout

    with Layout(tmp_path).locked() as lock:
        # A training that outlives its study keeps the lock.
        sleeper = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with pytest.raises(ValueError, match="a training that it left behind, is at work there"):
            with Layout(tmp_path).locked():
                pass
    finally:
        sleeper.kill()
        sleeper.wait()
    with Layout(tmp_path).locked():
        pass


# Time


def test_steps_fill_the_time():
    from scripts.study.training import core_share, steps_within

    assert steps_within(900, 0.7) == 1280  # of 1285, a multiple of 8
    assert steps_within(1, 10) == 8
    sessions = [{"cpu_seconds": 30.0, "wall_seconds": 60.0}, {"cpu_seconds": 60.0, "wall_seconds": 60.0}, {"load": 2.0}]
    assert core_share(sessions, threads=1) == 0.75 and core_share(sessions, threads=2) == 1.0


def test_time_is_read_from_a_log_with_gaps_and_repetitions(tmp_path):
    from scripts.study.training import seconds_after

    tag = "throughput/scenes_per_second"
    # The second session goes on from step 20; its line of step 30 counts, and the one of step 40 was lost.
    for session, rates in enumerate([{10: 6.0, 20: 3.0, 30: 1.0}, {30: 2.0, 50: 6.0}]):
        with SummaryWriter(str(tmp_path)) as writer:
            for step, rate in rates.items():
                writer.add_scalar(tag, rate, step, walltime=100.0 * session + step)
    seconds = seconds_after(tmp_path, [10, 15, 30, 50], {"pipeline.datamanager.scenes-per-batch": "6"})
    # Seconds per step: 1, 2, 3, the mean of the four known, 1.
    assert seconds == pytest.approx([10, 20, 60, 60 + 17.5 + 10])
    (tmp_path / "none").mkdir()
    assert seconds_after(tmp_path / "none", [8], {"pipeline.datamanager.scenes-per-batch": "6"}) == [0.0]


def test_a_training_goes_on_from_its_checkpoint_and_is_not_repeated(data, tmp_path, monkeypatch):
    from scripts.study import training as study_training
    from scripts.study.layout import Layout, read_json
    from scripts.study.variants import find_variants

    layout, settings, (plus,) = Layout(tmp_path), settings_of(data), find_variants(["plus"])
    plan = study_training.make_plan(layout, settings, plus, 42, lock=-1, tick=quiet)
    models = layout.run(plus, 42) / "nerfstudio_models"
    commands = []

    def run(status, checkpoint, command, session, log, *others):
        log.write_text("CUDA out of memory")
        commands.append(" ".join(command))
        models.mkdir(parents=True, exist_ok=True)
        (models / f"step-{checkpoint:09d}.ckpt").write_bytes(b"")
        session |= {"status": status, "wall_seconds": 8.0, "cpu_seconds": 4.0}

    def train(status, checkpoint):
        monkeypatch.setattr(study_training, "_run", lambda *given: run(status, checkpoint, *given))
        return study_training.train(layout, settings, plus, 42, plan, lock=-1, tick=quiet)

    with pytest.raises(study_training.TrainingError, match="(?s)plus: ns-train ended with status 1.*CUDA out of"):
        train(1, 6)
    record = train(0, 15)
    assert "--load-dir" not in commands[0] and f"--load-dir {models}" in commands[1]
    assert "--max-num-iterations 16 --optimizers.network.scheduler.max-steps 16 --steps-per-save 2" in commands[1]
    assert "--machine.seed 42 --pipeline.datamanager.seed 42" in commands[1]
    assert [session["from_step"] for session in record["sessions"]] == [0, 7] and record["core_share"] == 0.5
    train(1, 0)
    assert len(commands) == 2 and read_json(layout.training("plus", 42))["steps"] == 16


# Scores


def test_scores_are_of_the_first_views_for_baselines_and_networks_alike(data, tmp_path):
    from scripts.study.scoring import Scorer, by_views, only_psnr, score

    run = write_run(tmp_path, data)
    scorer = Scorer(settings_of(data))
    (scene,) = scorer.scenes("val", run / "config.yml")
    assert scene.name == "scene_4" and scene.views.context.num_views == 4 and len(scene.target_names) == 2
    assert not set(scene.context_names) & set(scene.target_names)

    rows = score(copy_nearest, [scene], (1, 2, 4), only_psnr)
    assert [row["context_views"] for row in rows] == [1, 1, 2, 2, 4, 4]
    truth = scene.views.target.rgb[0]
    copied = copy_nearest(scene.views.context.select([0, 1]), scene.views.target)[0]
    assert rows[3]["psnr"] == pytest.approx(float(psnr(copied[1], truth[1])))
    means = by_views(rows)
    assert means["1"]["psnr"] == pytest.approx((rows[0]["psnr"] + rows[1]["psnr"]) / 2)
    assert means["4"]["num_images"] == 2 and means["4"]["psnr_std"] == pytest.approx(
        abs(rows[4]["psnr"] - rows[5]["psnr"]) / 2
    )

    # A network renders as its own pipeline does from its memory.
    rows = score(
        scorer.network(run / "config.yml", run / "nerfstudio_models/step-000000000.ckpt"), [scene], (2,), only_psnr
    )
    pipeline = tiny_pipeline(data)
    with torch.no_grad():
        pipeline.model.network.head.weight.mul_(20)
    pipeline.model.set_context(replace(scene.views, context=scene.views.context.select([0, 1])))
    rgb = pipeline.model.get_outputs_for_camera(scene.cameras[1:2])["rgb"]
    assert rgb.std() > 0.05 and rows[1]["psnr"] == pytest.approx(float(psnr(rgb, truth[1])), abs=1e-4)


# Tables


def scores(value: float) -> dict:
    about = {"num_images": 6.0, "num_scenes": 3.0}
    return {
        str(count): {"psnr": value + count, "psnr_std": 2.0, "ssim": 0.5, "ssim_std": 0.1, **about}
        for count in (1, 2, 4)
    }


def row(name: str, steps: int, *values: float, error: str | None = None) -> dict:
    """A variant whose curve rises by 1 dB from half its steps to their end."""
    seeds = {}
    for seed, value in enumerate(values):
        training = {"seconds": 540.0, "sessions": [{"wall_seconds": 600.0}, {"load": 1.0}]}
        curve = [{"step": s, "minutes": s / 100, "psnr": p} for s, p in ((steps // 2, value + 3), (steps, value + 4))]
        seeds[str(seed)] = {"training": training, "curve": curve, "val": scores(value)}
    plan = {"method": "m", "steps": steps, "options": {"a.b": "1"}} if values else None
    return {"name": name, "tests": f"what {name} is", "method": "m", "plan": plan, "seeds": seeds, "error": error}


@pytest.fixture
def result() -> dict:
    rows = [
        row("paper-exact", 1000, 10.0, 11.0),
        row("plus", 800, 13.0, 13.4),
        row("plus-prefix", 0, error="status 1"),
    ]
    settings = {"data": "/somewhere/objects", "minutes": 9.0, "steps": None, "threads": 1, "context_views": [1, 2, 4]}
    return {
        "command": "python -m scripts.study.run --minutes 9",
        "code": {"version": "1", "commit": "abc"},
        "versions": {"torch": "2"},
        "machine": {"processor": "a processor", "device": "cpu"},
        "settings": settings,
        "variants": rows,
        "baselines": {"val": {"copy_nearest": scores(8.0), "mean_of_context": scores(9.0)}},
    }


def test_tables_show_equal_time_and_equal_steps(result):
    from scripts.study.report import markdown

    text = markdown(result)
    assert "# Study on objects, 9 minutes each" in text and "PSNR after 800 steps" in text
    # At the end 14 and 15; after 800 steps, on the line from 13 at 500 to 14 at 1000: 13.6, and 14.6.
    assert (
        "| paper-exact | what paper-exact is | 2 | 1,000 | 9.0 | 10.0 | 14.50 (14.00 to 15.00) | – "
        "| 14.10 (13.60 to 14.60) | – |" in text
    )
    assert (
        "| plus | what plus is | 2 | 800 | 9.0 | 10.0 | 17.20 (17.00 to 17.40) | +2.70 | 17.20 (17.00 to 17.40) "
        "| +3.10 |" in text
    )
    assert "| plus-prefix | what plus-prefix is | failed |" in text and "```\nstatus 1\n```" in text
    assert "Validation split by number of context views: 3 scenes, 6 images" in text
    assert "| copying the nearest context view | 9.00 +- 2.00 | 10.00 +- 2.00 | 12.00 +- 2.00 |" in text
    assert "| plus | 14.20 +- 2.00 | 15.20 +- 2.00 | 17.20 +- 2.00 |" in text and "SSIM ↑" in text
    assert "- plus: `ns-train m --a.b 1`" in text and "## Test" not in text


def test_the_test_split_has_tables_where_it_was_scored(result):
    from scripts.study.report import markdown

    result["variants"][1]["seeds"]["0"]["test"] = scores(20.0)
    result["baselines"]["test"] = result["baselines"]["val"]
    text = markdown(result).split("## Test split")[1]
    assert "| plus | 21.00 +- 2.00 |" in text and "| paper-exact |" not in text


def test_without_the_baseline_there_are_no_gains(result):
    from scripts.study.report import markdown

    result["variants"] = result["variants"][1:2]
    assert "| plus | what plus is | 2 | 800 | 9.0 | 10.0 | 17.20 (17.00 to 17.40) | – |" in markdown(result)
    result["variants"] = []
    assert markdown(result).startswith("# Study on objects")


def test_plots_and_pictures_are_written(result, tmp_path):
    from elvsm_nerfstudio.evaluation.report import sheet, write_image
    from scripts.study.report import read_picture, write_curves, write_pictures, write_views

    write_curves(tmp_path / "curves.png", result)
    write_views(tmp_path / "views.png", result)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curves.png", "views.png"))

    images = torch.arange(8).float()[:, None, None, None].expand(8, 4, 6, 3) / 10
    write_image(tmp_path / "baselines.png", sheet([list(images[:2]), list(images[2:4])]))
    for index in (4, 6):
        write_image(tmp_path / f"{index}.png", sheet([list(images[index : index + 2])]))
    write_pictures(tmp_path / "all.png", tmp_path / "baselines.png", [tmp_path / "4.png", tmp_path / "6.png"])
    expected = sheet([list(images[i : i + 2]) for i in (0, 2, 4, 6)])
    torch.testing.assert_close(read_picture(tmp_path / "all.png"), expected, atol=0.003, rtol=0)


# From end to end


def study(data: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "scripts.study.run", "--data", str(data), "--output", str(output),
        "--context-views", "1", "2", "4", "--num-target-views", "2", f"--train-options={TINY}", *options,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_keeps_what_is_done(data, tmp_path):
    output = tmp_path / "out"
    command = study(data, output, "--minutes", "0.05", "--variants", "paper-exact", "prope", "--score-test")
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    runs = output / "runs"
    while not list(runs.glob("paper-exact-seed_42/*/run/nerfstudio_models/step-*.ckpt")):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads((output / "study.json").read_text())
    first, second = content["variants"]
    sessions = first["seeds"]["42"]["training"]["sessions"]
    assert [session["status"] for session in sessions] == [-signal.SIGTERM, 0] and sessions[1]["from_step"] > 0
    assert second["plan"]["calibration"]["tokens_per_step"] == 2 * 4 * 4
    for variant in (first, second):
        run = variant["seeds"]["42"]
        steps = variant["plan"]["steps"]
        assert [point["step"] for point in run["curve"]] == [*(k * steps // 8 + 1 for k in range(1, 8)), steps]
        assert (
            run["curve"][-1]["psnr"] == pytest.approx(run["val"]["4"]["psnr"]) and run["test"]["1"]["num_scenes"] == 2
        )
        assert run["curve"][-1]["minutes"] == pytest.approx(run["training"]["seconds"] / 60)
        assert len(list(runs.glob(f"{variant['name']}-seed_42/*/run/nerfstudio_models/*"))) == 1
    assert {path.name for path in runs.iterdir()} == {"paper-exact-seed_42", "prope-seed_42"}
    for name in ("study.md", "curves.png", "views.png", "pictures.png"):
        assert (output / name).stat().st_size > 500, name

    # What is done is neither trained nor scored again: without the trainings' folders it could not be.
    for path in runs.glob("*/*/run/nerfstudio_models/step-*.ckpt"):
        path.write_bytes(b"")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert json.loads((output / "study.json").read_text())["variants"] == content["variants"]
