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
    "files": "",
    "notices": "",
    "programs": "",
    "stages": "",
    "unavailable": "",
    "views": "",
    "geometry": "",
    "nn": "files views geometry",
    "cameras": "views geometry",
    "data": "notices files views geometry cameras unavailable",
    "training": "files views geometry nn",
    "captures": "views geometry cameras data",
    "evaluation": "programs notices files views geometry data",
    "poses": "files stages data evaluation",
    "frames_ahead": "nn cameras",
    "model": "notices files views geometry nn cameras training evaluation frames_ahead programs",
    "evaluation.scored_network": "views nn data evaluation model",
    "viewer": "files views geometry nn training cameras data evaluation model",
    "splatting": "notices files views geometry nn cameras training data evaluation",
    "pipeline": "notices files programs nn training data model evaluation evaluation.scored_network viewer",
    "trainer": "notices files programs nn training evaluation pipeline",
    "method_configs": "programs nn training data model pipeline trainer splatting unavailable",
    "launch": "notices training trainer",
    "runs": "files nn training data evaluation method_configs",
    "downloads": "files nn training evaluation",
    "synthetic": "files downloads",
    "compare": "files views geometry nn cameras data evaluation model method_configs runs splatting",
    "show": "files stages views geometry nn data evaluation model poses compare runs",
    "cli": "stages files views geometry nn training evaluation poses compare synthetic downloads viewer runs show",
}
TORCH_ONLY = ("views", "geometry", "nn")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_entry_points_are_the_methods_names():
    from nerfstudio.plugins.types import MethodSpecification

    ours = [point for point in entry_points(group="nerfstudio.method_configs") if "elvsm" in point.value]
    lvsm = [f"lvsm-{kind}{size}" for kind in ("decoder-only", "encoder-decoder") for size in ("", "-tiny")]
    kinds = ("", "-512", "-object", "-plus", "-plus-tiny", "-tiny")
    names = [*(f"efficient-lvsm{kind}" for kind in kinds), *lvsm, "splatfacto-lvsm", "splatfacto-sparse"]
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
        if name.startswith("splatfacto"):  # Gaussians, no network
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
    assert result.stdout.replace("\n", "").count("elvsm_nerfstudio (cannot be imported: ModuleNotFoundError") == 14
    assert result.stdout.strip().endswith("[]")


def test_package_is_empty_at_import():
    result = run_python("import sys, elvsm_nerfstudio; print([m for m in ('torch', 'nerfstudio') if m in sys.modules])")
    assert result.stdout.strip() == "[]"


def room_of(module: str) -> str:
    """The room of a module of the package, the narrowest that is listed."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in ALLOWED), names[-1])


def files() -> list[tuple[str, Path]]:
    folders = {
        "elvsm_nerfstudio": ROOT / "elvsm_nerfstudio",
        "elvsm_nerfstudio.method_configs": ROOT / "method_configs",
    }
    listed = []
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inside = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix("__init__").rstrip(".")
            if package != "elvsm_nerfstudio" or inside:
                listed.append((room_of(f"{package}.{inside}".rstrip(".")), path))
    return listed


@pytest.mark.parametrize("room, path", files(), ids=lambda value: str(getattr(value, "name", value)))
def test_rooms_import_only_what_lies_below_them(room, path):
    assert room in ALLOWED, f"{path}: the room {room} is not in the table of who may import whom"
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            # `from elvsm_nerfstudio import x` may name a module or what the package itself offers.
            own = node.module == "elvsm_nerfstudio"
            modules += [f"elvsm_nerfstudio.{alias.name}" for alias in node.names] if own else [node.module or ""]
        for module in modules:
            where = f"{path.relative_to(ROOT)}:{node.lineno} imports {module}"
            parts = module.split(".")
            assert parts[0] not in ("scripts", "tests"), f"{where}; the package does without them"
            if parts[0] == "elvsm_nerfstudio" and len(parts) > 1 and not parts[1].startswith("__"):
                allowed = {*ALLOWED[room].split(), room}
                assert room_of(module) in allowed, f"{where}; {room} may import {sorted(allowed)}"
            if room in TORCH_ONLY:
                known = (*sys.stdlib_module_names, "torch", "einops", "jaxtyping", "elvsm_nerfstudio", "__future__")
                known += ("safetensors",) if path.name in ("memory.py", "weights.py") else ()
                known += ("huggingface_hub",) if path.name == "named_weights.py" else ()
                assert parts[0] in known, f"{where}; {room} may import torch, einops and jaxtyping only"


def test_no_program_imports_another_program():
    programs = {f"scripts.{path.parent.name}.{path.stem}" for path in (ROOT / "scripts").rglob("*.py")
                if '__name__ == "__main__"' in path.read_text()}  # fmt: skip
    assert {"scripts.study.run", "scripts.release.model_card", "scripts.benchmarks.efficiency"} < programs
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert not imported & programs, f"{path.relative_to(ROOT)}:{node.lineno} imports a program"


def test_names_in_what_is_printed_are_no_markup():
    """A path may hold [brackets]."""
    for path in (
        file for folder in ("elvsm_nerfstudio", "method_configs", "scripts") for file in (ROOT / folder).rglob("*.py")
    ):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func).lower() != "console.print" or isinstance(call.args[0], ast.Constant):
                continue
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            assert options.get("markup") == "False", f"{path.relative_to(ROOT)}:{call.lineno} prints with markup"


def test_the_command_lists_its_verbs_without_torch():
    """And a verb's module is imported only when it is called."""
    result = run_python(
        "import sys\n"
        "from elvsm_nerfstudio.cli import main\n"
        "for args in ([], ['--help'], ['data'], ['data', '--help'], ['--version'], ['rnu']):\n"
        "    try: main(args)\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'tyro', 'nerfstudio')"
        " or m.startswith('elvsm_nerfstudio.') and not m.startswith('elvsm_nerfstudio.cli')))\n"
        "print(sorted(m for m in sys.modules if m.startswith('elvsm_nerfstudio.cli')))"
    )
    assert result.returncode == 0, result.stderr
    *_, unknown, heavy, own = result.stdout.splitlines()
    assert unknown.startswith("exit error: elvsm rnu is unknown; expected one of ") and "did you mean run?" in unknown
    assert (heavy, own) == ("[]", "['elvsm_nerfstudio.cli', 'elvsm_nerfstudio.cli.data']")
    assert result.stdout.count("usage: elvsm VERB") == 2 and result.stdout.count("usage: elvsm data VERB") == 2


def fields_without_a_value(config, name: str = "config") -> list[str]:
    """Fields of a config and of those in it that a file of an earlier version, loaded without a constructor, lacks."""
    from dataclasses import fields, is_dataclass

    if isinstance(config, dict):
        return [found for key, value in config.items() for found in fields_without_a_value(value, f"{name}.{key}")]
    if not is_dataclass(config) or isinstance(config, type):
        return []
    missing = [f"{name}.{field.name}" for field in fields(config) if not hasattr(config, field.name)]
    return missing + fields_without_a_value(vars(config), name)


@pytest.mark.parametrize("path", sorted((ROOT / "tests/released_configs").rglob("*.yml")), ids=lambda p: p.stem)
def test_configs_of_released_versions_load(path):
    """config.yml stores the paths of classes, and no field that came later; read by nerfstudio, and as data by us."""
    import yaml
    from nerfstudio.engine.trainer import TrainerConfig

    from elvsm_nerfstudio.training.run_config import read_run_config

    config = yaml.load(path.read_text(), Loader=yaml.Loader)
    assert isinstance(config, TrainerConfig) and config.method_name == path.stem
    assert config.pipeline._target.__module__.startswith("elvsm_nerfstudio.")
    assert not fields_without_a_value(config)
    assert read_run_config(path) == config
