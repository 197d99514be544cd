"""The weights that come with the package: found by name wherever it is installed, and used without any file to get."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_cli, tiny_pipeline
from safetensors import safe_open

from elvsm_nerfstudio import method_configs
from elvsm_nerfstudio.nn import named_weights
from elvsm_nerfstudio.nn.weights import load_weights, read_weights

ROOT = Path(__file__).parents[1]
NAME = Path("pretrained")


def test_other_paths_are_themselves():
    for path in (Path("weights.pt"), Path("folder/pretrained"), Path("/pretrained")):
        assert named_weights.weights_path(path) == path


def test_the_shipped_weights_are_small_and_those_of_the_method():
    path = named_weights.weights_path(NAME)
    assert path.name == "efficient-lvsm-plus-tiny.safetensors" and path.stat().st_size <= 20e6
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.bfloat16}
    network = method_configs.efficient_lvsm_plus_tiny.config.pipeline.model.network.build()
    load_weights(network, NAME)
    weights = read_weights(NAME)
    assert weights.complete
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights.state[name].float()), name


def test_training_starts_from_them_and_another_method_says_what_does_not_fit(collection):
    config = method_configs.efficient_lvsm_plus_tiny.config.pipeline.model
    config = type(config)(network=config.network, checkpoint=NAME)
    model = config.setup(scene_box=None, num_train_data=1)
    assert torch.equal(model.network.head.weight, read_weights(NAME).state["head.weight"].float())
    other = tiny_pipeline(collection).model.config
    other.checkpoint = NAME
    with pytest.raises(ValueError, match="--pipeline.model.checkpoint pretrained: found weights of .*prope.*expected"):
        other.setup(scene_box=None, num_train_data=1)


def test_without_them_the_message_says_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(named_weights, "_FOLDERS", (tmp_path / "one", tmp_path / "two"))
    with pytest.raises(ValueError, match="^pretrained: found no .*-plus-tiny.safetensors in .*one or .*two"):
        read_weights(NAME)


def test_a_run_of_them_on_a_capture(tmp_path, scene):
    made = run_cli("elvsm", "run", "--weights", "pretrained", "--data", str(scene),
                   cwd=tmp_path)  # fmt: skip
    config = made.stdout.split()[-1]
    assert config == "outputs/pretrained-spheres/efficient-lvsm-plus-tiny/run/config.yml"
    network = yaml.load((tmp_path / config).read_text(), Loader=yaml.Loader).pipeline.model.network
    assert network.camera_encoding == "prope"


def test_a_wheel_holds_them_and_finds_them(tmp_path):
    """Built from a copy, as building leaves folders behind."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("elvsm_nerfstudio", "method_configs", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as content:
        held = [name for name in content.namelist() if name.startswith("elvsm_nerfstudio/assets/")]
        content.extractall(installed)
    assert f"elvsm_nerfstudio/assets/{named_weights.PRETRAINED_FILE}" in held
    assert not [name for name in held if name.endswith((".png", ".jpg"))]
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from pathlib import Path; "
    code += "from elvsm_nerfstudio.nn.named_weights import weights_path; print(weights_path(Path('pretrained')))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(installed / "elvsm_nerfstudio/assets" / named_weights.PRETRAINED_FILE)
