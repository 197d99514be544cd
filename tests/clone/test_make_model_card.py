"""From a run to weights with a card, and what the card says."""

import json
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import TINY_NETWORK, run_cli, write_collection
from PIL import Image

from elvsm_nerfstudio import method_configs
from elvsm_nerfstudio.files import write_safetensors
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.weights import FORMAT, read_weights, save_weights
from scripts.release import card_text as text
from scripts.release import model_card as script


def test_the_command_says_what_differs_from_the_method():
    default = method_configs.efficient_lvsm_plus_tiny.config
    config = deepcopy(default)
    config.data, config.experiment_name, config.load_dir = Path("data/x"), "box", Path("elsewhere")
    config.pipeline.datamanager.num_context_views = (2, 5)
    config.pipeline.model.network.ray_frame = "canonical"
    config.optimizers["network"]["scheduler"].max_steps = 70
    config.gradient_accumulation_steps = {"network": 4}
    assert text.training_command(config, default).replace(" \\\n    ", " ") == (
        "ns-train efficient-lvsm-plus-tiny --pipeline.datamanager.num-context-views 2 5 "
        "--pipeline.model.network.ray-frame canonical --optimizers.network.scheduler.max-steps 70 "
        "--gradient-accumulation-steps network 4 "
        "--data data/x --experiment-name box"
    )


def test_every_creator_is_credited_with_the_number_of_objects():
    listed = (("B", "CC0", "zoe"), ("A", "CC-BY", "Ann"), ("B", "CC0", "Bo"), ("B", "CC0", "zoe"))
    scenes = [dict(zip(("library", "licence", "creator"), one)) for one in listed]
    assert text.credits_table(scenes).splitlines()[2:] == ["| A | CC-BY | 1 | Ann |", "| B | CC0 | 3 | Bo, zoe (2) |"]


def test_tables_of_scores_leave_out_metrics_that_were_not_measured():
    names = ("psnr", "ssim", "psnr_copy_nearest", "psnr_mean_of_context")
    scores = {name + end: 1.5 for name in names for end in ("", "_std")}
    table = text.scores_table({"1": scores, "16": {**scores, "psnr": 20.0}}).splitlines()
    assert table[0] == "| context views | PSNR | SSIM | PSNR, copying the nearest | PSNR, mean of context |"
    assert table[3] == "| 16 | 20.00 +- 1.50 | 1.500 +- 1.500 | 1.50 +- 1.50 | 1.50 +- 1.50 |"


def test_best_median_and_worst():
    assert script.best_median_worst(list("abcdefghijk")) == ["k", "j", "i", "g", "f", "e", "c", "b", "a"]
    assert script.best_median_worst(["a", "b"]) == ["b", "a"]


def test_weights_are_new_unless_the_file_holds_the_same(tmp_path):
    config, other = EfficientLVSMConfig(width=32, num_layers=2, head_dim=16), tmp_path / "other.safetensors"
    state = config.build().state_dict()
    save_weights(tmp_path / "a.safetensors", state, config)
    save_weights(tmp_path / "b.safetensors", dict(reversed(state.items())), config)
    assert script.is_as(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    save_weights(other, {**state, "head.weight": state["head.weight"] + 1}, config)
    assert not script.is_as(other, tmp_path / "a.safetensors")
    save_weights(other, state, replace(config, context_init="torch"))
    assert not script.is_as(other, tmp_path / "a.safetensors")
    # Of a version with an option that is gone.
    gone = json.dumps({**asdict(config), "registers": 4})
    write_safetensors(other, state, {"format": FORMAT, "network": "EfficientLVSMConfig", "config": gone})
    with pytest.raises(ValueError, match="written by another version"):
        read_weights(other)
    assert not script.is_as(other, tmp_path / "a.safetensors")


def test_the_card_names_the_commands_of_every_stage(tmp_path):
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": [], "resolution": 128, "views_per_object": 48}))
    command = text.data_command(tmp_path)
    assert command == f"elvsm data objects --output {tmp_path} --resolution 128 --views-per-object 48"
    first = {"commands": ["a", "b"], "commit": None, "steps": 5601, "seconds_per_step": 0.84}
    second = {"commands": ["c"], "commit": "abc", "steps": 20, "seconds_per_step": 1.5}
    assert text.stages_text([first, second]) == (
        "Stage 1: 5,601 steps, 0.84 s each.\n\n```bash\na\nb\n```\n\n"
        "Stage 2: 20 steps, 1.50 s each, at commit abc.\n\n```bash\nc\n```"
    )


def test_the_curve_goes_through_the_stages(tmp_path, monkeypatch):
    curves = {
        "training batches": [{"step": 0, "minutes": 0.0, "psnr": 12.0}, {"step": 9, "minutes": 3.0, "psnr": 14.0}]
    }
    monkeypatch.setattr(script, "read_curves", lambda run: curves)
    monkeypatch.setattr(script, "last_step", lambda run: 10)
    (joined,) = script.joined_curves([tmp_path / "a/config.yml", tmp_path / "b/config.yml"]).values()
    assert [(row["step"], row["minutes"]) for row in joined] == [(0, 0), (9, 3), (11, 3), (20, 6)]
    shown = [text.last_stages(*counts) for counts in ((1, 1), (3, 3), (1, 3), (2, 5))]
    assert shown == ["The whole training", "All stages", "Stage 3", "Stages 4 to 5"]


def test_a_training_from_weights_goes_on_from_the_stages_before_it(tmp_path, monkeypatch):
    configs = {}
    for name, start in (("first", "pretrained"), ("last", "first.safetensors")):
        config = configs[tmp_path / name / "config.yml"] = deepcopy(method_configs.efficient_lvsm_plus_tiny.config)
        config.data, config.pipeline.model.checkpoint = (
            write_collection(tmp_path / f"{name}_data", "train"),
            Path(start),
        )
    configs[tmp_path / "last" / "config.yml"].pipeline.model.perceptual.backbone = "lpips"
    monkeypatch.setattr(script, "read_network_config", lambda path, option: configs[path])
    monkeypatch.setattr(script, "_costs", lambda run: {"steps": 20})
    monkeypatch.setattr(script, "last_step", lambda run: 19)
    first, last = configs
    args = script.Args(last, earlier_runs=(first,), output=tmp_path / "model.safetensors", commits=("abc", "def"))
    with pytest.raises(
        ValueError, match=r"started from weights \(pretrained\), and .*model.stages.json does not exist"
    ):
        script.stages_of(args)
    before = {"commands": ["elvsm data objects", "ns-train"], "steps": 3}
    script.stages_file(args.output).write_text(json.dumps([before]))
    stages = script.stages_of(args)
    assert [stage["steps"] for stage in stages] == [3, 20, 20]
    assert [stage["commit"] for stage in stages[1:]] == ["abc", "def"]
    assert f"elvsm export --load-config {first} --output first.safetensors" == stages[2]["commands"][1]
    assert "elvsm fetch lpips" == stages[2]["commands"][2] and len(stages[1]["commands"]) == 2
    assert "--pipeline.model.checkpoint pretrained" in stages[1]["commands"][-1] and stages[1]["stopped"]
    assert [stage["commit"] for stage in script.stages_of(replace(args, commits=("abc",)))[1:]] == ["abc", "abc"]
    with pytest.raises(ValueError, match="--commits: found 3; expected one, or one for each of the 2 runs"):
        script.stages_of(replace(args, commits=("a", "b", "c")))
    script.stages_file(args.output).write_text(json.dumps(stages))
    assert script.stages_of(args) == stages, "a card that is made again has no stage twice"


@pytest.mark.slow
def test_from_a_run_to_weights_and_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_collection(tmp_path / "objects", "train train val test test", num_frames=24, size=(16, 16))
    made_by = {"library": "Lib", "licence": "CC-BY 3.0"}
    collection = json.loads((data / "scenes.json").read_text())
    for number, listed in enumerate(collection["scenes"]):
        listed.update(made_by, creator=f"maker {number}")
    (data / "scenes.json").write_text(json.dumps(collection))
    run_cli("ns-train", "efficient-lvsm-plus-tiny", *TINY_NETWORK, "--data", "objects", "--machine.device-type", "cpu",
            "--vis", "tensorboard", "--max-num-iterations", "3", "--logging.steps-per-log", "1",
            "--output-dir", "outputs", "--experiment-name", "box", "--timestamp", "run",
            "--steps-per-eval-batch", "100", "--steps-per-eval-image", "100", cwd=tmp_path)  # fmt: skip
    config = Path("outputs/box/efficient-lvsm-plus-tiny/run/config.yml")
    args = script.Args(
        config,
        Path("objects"),
        Path("objects"),
        Path("objects"),
        commits=("abc123",),
        output=Path("assets/model.safetensors"),
    )
    card = script.make_model_card(args)
    assert card == Path("assets/model.md")
    content = card.read_text()
    assert "{" not in content and "| 16 | " in content and "2 objects, 16 images for each number of views" in content
    assert "maker 0, maker 1 |" in content and "maker 4" not in content.split("## Data")[1]
    assert (
        "--max-num-iterations 3 " in content
        and "3 steps, the last ones of 2 scenes, 2 context and 2 target views" in content
    )
    assert "Stage 1: 3 steps" in content and "at commit abc123" in content
    assert "## Other lenses" in content and "| targets, principal point 2 px off | " in content
    assert "## Patches" in content and content.count("\n| 4 | ") == 3 and "## The same, reduced" not in content
    assert "## Objects of another source" in content and script.sha256(args.output) in content
    assert read_weights(args.output).state["head.weight"].element_size() == 2
    for name in ("views", "samples", "curve"):
        assert f"(model_{name}.png)" in content
    assert Image.open("assets/model_samples.png").size == (2 * (12 * 20 - 4), 2 * (2 * 20 - 4))
    monkeypatch.setattr(script.subprocess, "run", None)  # scored already
    assert script.make_model_card(args).read_text() == content
