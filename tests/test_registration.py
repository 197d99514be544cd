"""What nerfstudio sees of the package, and the rules of the house."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "gsplat",
    "lpips",
    "flip_evaluator",
    "matplotlib",
    "moderngl",
    "trimesh",
    "open3d",
    "skimage",
    "transformers",
    "onnx",
    "torchmetrics.image.lpip",
)

ALLOWED = {
    # room: rooms of the package that it may import
    "files": set(),
    "views": set(),
    "geometry": set(),
    "nn": {"files", "views", "geometry"},
    "cameras": {"views", "geometry"},
    "training": {"files", "nn", "views", "geometry"},
    "unavailable": set(),
    "data": {"files", "views", "geometry", "cameras", "unavailable"},
    "evaluation": {"files", "views", "geometry", "data"},
    "poses": {"files", "data", "evaluation"},
    "model": {"views", "geometry", "nn", "cameras", "training", "evaluation"},
    "evaluator": {"views", "nn", "evaluation", "data", "model"},
    "frustums": {"data"},
    "viewer": {"views", "nn", "cameras", "data", "model", "frustums"},
    "splatting": {"geometry", "cameras", "data", "evaluation"},
    "pipeline": {"views", "geometry", "nn", "training", "evaluation", "data", "model", "evaluator", "viewer"},
    "trainer": {"files", "nn", "training", "pipeline"},
    "method_configs": {"nn", "training", "data", "model", "pipeline", "trainer", "splatting", "unavailable"},
}
TORCH_ONLY = ("views", "geometry", "nn")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_entry_points_are_the_methods_names():
    from nerfstudio.plugins.types import MethodSpecification

    ours = [point for point in entry_points(group="nerfstudio.method_configs") if "elvsm" in point.value]
    lvsm = [f"lvsm-{kind}{size}" for kind in ("decoder-only", "encoder-decoder") for size in ("", "-tiny")]
    kinds = ("", "-512", "-object", "-plus", "-plus-tiny", "-tiny")
    names = [*(f"efficient-lvsm{kind}" for kind in kinds), *lvsm, "splatfacto-sparse"]
    assert sorted(point.name for point in ours) == names
    for point in ours:
        spec = point.load()
        assert isinstance(spec, MethodSpecification) and spec.config.method_name == point.name


def test_dataparsers_are_registered_for_every_method():
    from nerfstudio.configs.dataparser_configs import all_dataparsers

    assert all_dataparsers["realestate10k"]._target.__name__ == "RealEstate10K"
    assert all_dataparsers["posed-json"]._target.__name__ == "PosedJson"


def test_sizes_of_the_methods():
    import torch

    from elvsm_nerfstudio import method_configs

    counts = {}
    for name in method_configs.__all__:
        if name == "splatfacto_sparse":  # Gaussians, no network
            continue
        pipeline = getattr(method_configs, name).config.pipeline
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in pipeline.model.network.build().parameters())
        side = 64 if name.endswith("tiny") else 512 if name.endswith("512") else 256
        assert pipeline.datamanager.image_size == (side, side)
    assert counts == {
        "efficient_lvsm": 199_070_208,
        "efficient_lvsm_512": 199_070_208,
        "efficient_lvsm_object": 199_070_208,
        "efficient_lvsm_plus": 199_070_208,
        "efficient_lvsm_plus_tiny": 7_636_480,
        "efficient_lvsm_tiny": 7_636_480,
        "lvsm_decoder_only": 170_795_520,
        "lvsm_decoder_only_tiny": 7_640_576,
        "lvsm_encoder_decoder": 173_154_816,
        "lvsm_encoder_decoder_tiny": 7_689_728,
    }


def test_configs_survive_yaml():
    import yaml

    from elvsm_nerfstudio import method_configs

    for name in method_configs.__all__:
        config = getattr(method_configs, name).config
        assert yaml.load(yaml.dump(config), Loader=yaml.Loader) == config


def test_checkpoints_of_nerfstudios_own_schedulers_are_read():
    """Wherever this package is installed, since it is what brings a torch that refuses them."""
    result = run_python(
        "import io, torch\n"
        "from nerfstudio.configs.method_configs import method_configs\n"  # as every one of nerfstudio's programs
        "from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig\n"
        "optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.1)\n"
        "scheduler = ExponentialDecaySchedulerConfig(max_steps=9).setup().get_scheduler(optimizer, 0.1)\n"
        "optimizer.step(); scheduler.step()\n"
        "file = io.BytesIO()\n"
        "torch.save([optimizer.state_dict(), scheduler.state_dict()], file)\n"
        "file.seek(0)\n"
        "read, _ = torch.load(file)\n"
        "print(type(read['param_groups'][0]['lr']).__name__)"
    )
    assert result.stdout.split() == ["float64"], result.stderr


def test_importing_the_methods_is_light():
    """Nothing heavy is imported beyond what nerfstudio's trainer, data managers and own methods import themselves."""
    result = run_python(
        "import sys\n"
        "import nerfstudio.engine.trainer, nerfstudio.data.datamanagers.base_datamanager\n"
        "import nerfstudio.models.splatfacto\n"
        "before = set(sys.modules)\n"
        "import elvsm_nerfstudio.method_configs as m\n"
        "assert m.efficient_lvsm.config.method_name == 'efficient-lvsm', m.efficient_lvsm\n"
        f"print([n for n in set(sys.modules) - before if n.startswith({HEAVY!r})])"
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_a_broken_installation_does_not_stop_other_methods():
    result = run_python(
        "import sys\n"
        "sys.modules['elvsm_nerfstudio.data.chunks'] = None\n"
        "from nerfstudio.plugins.registry import discover_methods\n"
        "methods, _ = discover_methods()\n"
        "from nerfstudio.configs.dataparser_configs import all_dataparsers\n"
        "print(sorted(m for m in (*methods, *all_dataparsers) if 'lvsm' in m or 'posed-json' in m))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace("\n", "").count("elvsm_nerfstudio (cannot be imported: ModuleNotFoundError") == 13
    assert result.stdout.strip().endswith("[]")


def test_package_is_empty_at_import():
    result = run_python("import sys, elvsm_nerfstudio; print([m for m in ('torch', 'nerfstudio') if m in sys.modules])")
    assert result.stdout.strip() == "[]"


def files() -> list[tuple[str, Path]]:
    package = [(p.relative_to(ROOT / "elvsm_nerfstudio").parts[0].removesuffix(".py"), p)
               for p in sorted((ROOT / "elvsm_nerfstudio").rglob("*.py"))]  # fmt: skip
    return [*package, *(("method_configs", p) for p in sorted((ROOT / "method_configs").glob("*.py")))]


@pytest.mark.parametrize("room, path", files(), ids=lambda value: str(getattr(value, "name", value)))
def test_rooms_import_only_what_lies_below_them(room, path):
    if room == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            where = f"{path.relative_to(ROOT)}:{node.lineno} imports {module}"
            parts = module.split(".")
            if parts[0] == "elvsm_nerfstudio" and len(parts) > 1:
                allowed = ALLOWED[room] | {room}
                assert parts[1] in allowed, f"{where}; {room} may import {sorted(allowed)}"
            if room in TORCH_ONLY:
                known = (*sys.stdlib_module_names, "torch", "einops", "jaxtyping", "elvsm_nerfstudio", "__future__")
                files = ("memory_file.py", "weights.py")
                known += ("safetensors",) if path.name in files else ()
                assert parts[0] in known, f"{where}; {room} may import torch, einops and jaxtyping only"
