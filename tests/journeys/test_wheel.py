"""The package as pip installs it: a wheel in an environment without the clone, used from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from test_make_object_scenes import furniture  # noqa: F401, a fixture

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what an earlier build left in the clone is not part of it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("elvsm_nerfstudio", "method_configs", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_file_of_the_package(wheel):
    listed = set(zipfile.ZipFile(wheel).namelist())
    inside = {
        f"elvsm_nerfstudio/{path.relative_to(ROOT / 'elvsm_nerfstudio')}"
        for path in (ROOT / "elvsm_nerfstudio").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside |= {f"elvsm_nerfstudio/method_configs/{path.name}" for path in (ROOT / "method_configs").glob("*.py")}
    inside |= {f"elvsm_nerfstudio/assets/efficient-lvsm-plus-tiny.{suffix}" for suffix in ("safetensors", "md")}
    assert inside <= listed, sorted(inside - listed)
    others = {name for name in listed - inside if ".dist-info/" not in name}
    assert not others, sorted(others)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program of an environment that has the wheel, and this one's packages, but nothing of the clone."""
    environment, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    (packages,) = environment.glob("lib/python*/site-packages")
    # Paths that a .pth file adds are searched, but their own .pth files are not read: the clone stays away.
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--force-reinstall", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"PYTHONWARNINGS": "ignore", "COLUMNS": "200", "TORCH_HOME": str(folder / "torch")}

    def run(program: str, *arguments: object) -> str:
        given = [str(environment / "bin" / program), *map(str, arguments)]
        result = subprocess.run(given, cwd=folder, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, f"{given}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    run.folder, run.packages = folder, packages
    return run


def test_a_user_without_the_clone_goes_from_photos_to_a_camera_path_and_scores(installed, scene):
    where = installed("python", "-c", "import elvsm_nerfstudio; print(elvsm_nerfstudio.__file__)").strip()
    assert Path(where) == installed.packages / "elvsm_nerfstudio/__init__.py"
    config = installed("elvsm", "run", "--weights", "pretrained", "--data", scene).split()[-1]
    installed("elvsm", "orbit", "--load-config", config, "--output", "orbit.json", "--fps", "5", "--seconds", "2")
    assert len(json.loads((installed.folder / "orbit.json").read_text())["camera_path"]) == 10
    given = "--load-config", config, "--output-path", "scores.json"
    installed("python", "-m", "nerfstudio.scripts.eval", *given)
    assert json.loads((installed.folder / "scores.json").read_text())["results"]["num_images"] >= 1


def test_a_user_without_the_clone_compares(installed, scene):
    installed("elvsm", "compare", "--data", scene, "--methods", "efficient-lvsm-plus-tiny", "copy-nearest", "--output",
              "out", "--context-views", "2", "--num-target-views", "1", "--image-size", "32", "32",
              "--num-videos", "0")  # fmt: skip
    result = json.loads((installed.folder / "out/results.json").read_text())
    assert [record["status"] for record in result["records"]] == ["done", "done"]
    assert result["command"].startswith("elvsm compare --data ")
    assert "/*" not in (installed.folder / "out/index.html").read_text().split("<script>")[0].split("<style>")[0]


def test_a_user_without_the_clone_fetches_and_renders_data(installed, furniture):  # noqa: F811
    path = installed.folder / "torch/hub/checkpoints/imagenet-vgg-verydeep-19.mat"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"as if fetched before")
    assert installed("elvsm", "fetch", "vgg19").strip() == str(path)
    installed("elvsm", "data", "objects", "--output", "objects", "--furniture-cache", furniture, "--splits", "test",
              "--resolution", "16", "--views-per-object", "8", "--num-workers", "1")  # fmt: skip
    assert list((installed.folder / "objects").glob("*/images/*.png"))
