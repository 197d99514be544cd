"""A run's config.yml is data: read as nerfstudio reads it, without anything in it being called."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from nerfstudio.plugins.types import MethodSpecification

from elvsm_nerfstudio import cli, method_configs
from elvsm_nerfstudio.nn.weights import RUN_PREFIX
from elvsm_nerfstudio.training.run_config import network_of_checkpoint, network_of_run, read_run_config

SPECIFICATIONS = [getattr(method_configs, name) for name in method_configs.__all__]
METHODS = {
    specification.config.method_name: specification.config
    for specification in SPECIFICATIONS
    if isinstance(specification, MethodSpecification)
}
RELEASED = Path(__file__).parents[1] / "released_configs"
TINY = METHODS["efficient-lvsm-tiny"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_read_as_it_was_written(tmp_path, name):
    path, config = tmp_path / "config.yml", METHODS[name]
    path.write_text(yaml.dump(config), "utf8")
    assert read_run_config(path) == config and yaml.dump(read_run_config(path)) == path.read_text("utf8")
    assert network_of_run(path) == getattr(config.pipeline.model, "network", None)


@pytest.mark.parametrize("path", sorted(RELEASED.rglob("*.yml")), ids=lambda path: path.stem)
def test_configs_of_released_versions_are_read_as_nerfstudio_reads_them(path):
    config = yaml.load(path.read_text("utf8"), Loader=yaml.Loader)
    assert read_run_config(path) == config
    assert network_of_run(path) == getattr(config.pipeline.model, "network", None)


HOSTILE = {
    "call": '!!python/object/apply:os.system ["touch {marker}"]',
    "call with keywords": '!!python/object/apply:os.system\n      args: ["touch {marker}"]',
    "new": '!!python/object/new:os.system ["touch {marker}"]',
    "call of nerfstudio": '!!python/object/apply:nerfstudio.utils.scripts.run_command ["touch {marker}"]',
    "call of a class": '!!python/object/apply:elvsm_nerfstudio.training.checkpoints.CheckpointError ["x"]',
    "path that is none": '!!python/object/apply:pathlib.Path.touch ["{marker}"]',
    "module": "!!python/module:this ''",
    "function": "!!python/name:os.system ''",
    "function of nerfstudio": "!!python/name:nerfstudio.utils.scripts.run_command ''",
    "object": "!!python/object:subprocess.Popen {{args: [touch, {marker}]}}",
    "program": "!!python/name:elvsm_nerfstudio.cli.__main__.X ''",
    "class that is no config": "!!python/object:elvsm_nerfstudio.nn.efficient_lvsm.EfficientLVSM {{}}",
}


def hostile_run(folder: Path, tag: str) -> Path:
    """The config.yml of a run with a tag in place of its network, and a checkpoint beside it."""
    marker, content = folder / "executed", yaml.dump(TINY)
    start = content.index("    network: ")
    stop = content.index("    precision:")
    path = folder / "config.yml"
    path.write_text(f"{content[:start]}    network: {tag.format(marker=marker)}\n{content[stop:]}", "utf8")
    (folder / "nerfstudio_models").mkdir()
    state = {f"{RUN_PREFIX}{name}": x for name, x in TINY.pipeline.model.network.build().state_dict().items()}
    torch.save({"step": 7, "pipeline": state}, folder / "nerfstudio_models/step-000000007.ckpt")
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_config_is_refused_before_anything_runs(tmp_path, kind):
    path = hostile_run(tmp_path, HOSTILE[kind])
    for read in (read_run_config, network_of_run):
        with pytest.raises(ValueError, match=r"config.yml: not the config.yml of a run .*(\n.*)*line \d+"):
            read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["whole file", "beside the network"])
def test_tags_elsewhere_are_not_looked_at_for_the_network_alone(tmp_path, where):
    tag = HOSTILE["call"].format(marker=tmp_path / "executed")
    path = tmp_path / "config.yml"
    content = f"!!python/object/apply:os.system ['touch {tmp_path}/executed']"
    path.write_text(
        content if where == "whole file" else yaml.dump(TINY).replace("    precision: auto", f"    x: {tag}")
    )
    assert network_of_run(path) == (None if where == "whole file" else TINY.pipeline.model.network)
    with pytest.raises(ValueError, match="found a call of os.system|os.system, which is no config"):
        read_run_config(path)
    assert not (tmp_path / "executed").exists()


def test_a_config_cannot_name_another_class_to_be_built(tmp_path):
    path = tmp_path / "config.yml"
    own = "!!python/name:elvsm_nerfstudio.model.EfficientLVSMModel"
    content = yaml.dump(TINY)
    assert own in content
    path.write_text(content.replace(own, "!!python/name:elvsm_nerfstudio.trainer.EfficientLVSMTrainer"))
    with pytest.raises(ValueError, match="EfficientLVSMModelConfig is of .*Trainer'>, expected .*EfficientLVSMModel"):
        read_run_config(path)


def test_weights_of_a_hostile_run_are_not_its_code(tmp_path):
    """--pipeline.model.checkpoint."""
    path = hostile_run(tmp_path, HOSTILE["call"])
    checkpoint = path.parent / "nerfstudio_models/step-000000007.ckpt"
    config = type(TINY.pipeline.model)(network=TINY.pipeline.model.network, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="--pipeline.model.checkpoint .*found os.system, which is no config"):
        config.setup(scene_box=None, num_train_data=1)
    assert not (tmp_path / "executed").exists()


def test_going_on_with_a_hostile_run_does_not_run_it(tmp_path):
    """--load-dir."""
    folder = hostile_run(tmp_path, HOSTILE["call"]).parent / "nerfstudio_models"
    config = replace(TINY, load_dir=folder, output_dir=tmp_path / "out", experiment_name="x", timestamp="run")
    with pytest.raises(ValueError, match="config.yml: .*found os.system, which is no config"):
        config.save_config()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "verb, options",
    [
        ("run", ["--from-run", "config.yml"]),
        ("export", ["--load-config", "config.yml", "--output", "w.safetensors"]),
        ("orbit", ["--load-config", "config.yml", "--output", "orbit.json"]),
        ("stream", ["--load-config", "config.yml", "--output", "stream.mp4"]),
    ],
)
def test_programs_that_take_a_run_do_not_run_it(tmp_path, monkeypatch, verb, options):
    hostile_run(tmp_path, HOSTILE["call"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: config.yml: .*found os.system, which is no config"):
        cli.main([verb, *options])
    assert not (tmp_path / "executed").exists()


def test_what_is_no_run_has_no_network(tmp_path):
    (tmp_path / "config.yml").write_text("- 1\n- 2\n")
    assert network_of_run(tmp_path / "config.yml") is None
    assert network_of_run(tmp_path / "nowhere.yml") is None
    assert network_of_checkpoint(tmp_path / "a/b/weights.pt") is None
    (tmp_path / "config.yml").write_text("a: [")
    with pytest.raises(ValueError, match="config.yml: not the config.yml of a run"):
        network_of_run(tmp_path / "config.yml")
