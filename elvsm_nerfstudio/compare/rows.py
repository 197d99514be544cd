"""Which methods `elvsm compare` compares, and with what weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Optional

import torch
from nerfstudio.configs.method_configs import all_methods

from elvsm_nerfstudio.compare.gaussians import GAUSSIANS, SPLATFACTO, WITH_RENDERS
from elvsm_nerfstudio.compare.layout import MethodSpec
from elvsm_nerfstudio.compare.methods import network_config
from elvsm_nerfstudio.compare.options import CompareOptions
from elvsm_nerfstudio.evaluation.baselines import BASELINES
from elvsm_nerfstudio.nn.named_weights import PRETRAINED, PRETRAINED_METHOD, trained_image_size, weights_path
from elvsm_nerfstudio.runs import last_checkpoint, network_methods, read_network_config
from elvsm_nerfstudio.splatting.rendering_weights import load_renderer

DEFAULT_SIZE = (128, 128)
"""Where no run says what it was trained for. Ours."""
OTHER_DATA = "trained on other data than compared on here"


def find_methods(args: CompareOptions, whole_scenes: bool) -> list[MethodSpec]:
    """The rows of the comparison.

    Args:
        whole_scenes: the data's scenes belong to one split each, as a whole.

    Raises:
        ValueError: for unknown methods, and runs that are missing, too many, or of another method.
    """
    runs = {}
    for run in args.runs:
        name, separator, path = run.partition("=")
        if not separator or not path:
            raise ValueError(f"--runs {run}: expected NAME=PATH, e.g. efficient-lvsm-tiny=outputs/.../run")
        runs[name] = Path(path)
    if PRETRAINED_METHOD in args.methods:
        runs.setdefault(PRETRAINED_METHOD, Path(PRETRAINED))
    _check_finetuning(args, runs)
    networks, installed = network_methods(), {point.name for point in entry_points(group="nerfstudio.method_configs")}
    baselines = [name.replace("_", "-") for name in BASELINES]
    known = [*networks, *baselines, *sorted({GAUSSIANS, WITH_RENDERS} & installed), SPLATFACTO]
    for name in runs:
        if name not in args.methods:
            raise ValueError(f"--runs {name}=...: not among --methods, which are {', '.join(args.methods)}")
    specs = []
    for name in dict.fromkeys(args.methods):
        if name not in known and name not in runs:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"--methods {name}: no such method; did you mean {nearest}? There are {', '.join(known)}, and any "
                f"name with a run of its own: --runs {name}=RUN"
            )
        if name in runs and name in (*baselines, GAUSSIANS, SPLATFACTO):
            raise ValueError(f"--runs {name}=...: {name} takes no run, it is made from each scene's context views here")
        if name in baselines:
            specs.append(MethodSpec(name, "baseline", name, note="needs no learning: what a number is worth"))
        elif name == GAUSSIANS:
            specs.append(_gaussians(args))
        elif name == WITH_RENDERS:
            specs.append(_with_renders(args, runs.get(name, Path(PRETRAINED))))
        elif name == SPLATFACTO:
            specs.append(_splatfacto())
        elif name not in runs:
            raise ValueError(f"--methods {name}: needs weights; give --runs {name}=RUN, the folder of a trained run")
        else:
            spec = _network(name, runs[name], args, whole_scenes)
            specs.append(spec)
            if name in args.finetune:
                title = f"{name} (fine-tuned)"
                note = f"{spec.note}; then {args.finetune_minutes:g} min on each scene's context views"
                specs.append(replace(spec, name=title, finetune_minutes=args.finetune_minutes, note=note))
    return specs


def _check_finetuning(args: CompareOptions, runs: Mapping[str, Path]) -> None:
    for name in args.finetune:
        if name not in args.methods or name not in runs:
            trained = ", ".join(runs) or "none"
            raise ValueError(f"--finetune {name}: expected a network of --methods with weights, which are: {trained}")
    if args.finetune and min(args.context_views) < 2:
        raise ValueError("--finetune: needs at least 2 context views, one to predict from the others; found 1")
    if args.finetune_minutes <= 0:
        raise ValueError(f"--finetune-minutes {args.finetune_minutes:g}: expected a number above 0")


def _gaussians(args: CompareOptions) -> MethodSpec:
    if args.backend == "gsplat" and not torch.cuda.is_available():
        raise ValueError("--backend gsplat: found no GPU that PyTorch can use; take --backend cpu, or auto")
    note = f"optimised on each scene's context views, {args.splat_iterations} steps"
    return MethodSpec(
        GAUSSIANS, "gaussians", GAUSSIANS, iterations=args.splat_iterations, backend=args.backend, note=note
    )


def _with_renders(args: CompareOptions, weights: Path) -> MethodSpec:
    name = str(weights.resolve() if weights.exists() else weights)
    try:
        file = load_renderer(name, "cpu").file
    except ValueError as error:
        raise ValueError(f"--runs {WITH_RENDERS}={weights}: {error}") from None
    plain, stat = _gaussians(args), file.stat()
    return replace(
        plain,
        name=WITH_RENDERS,
        method=WITH_RENDERS,
        weights=name,
        weights_stamp=(stat.st_size, stat.st_mtime_ns),
        note=f"{plain.note}, and on views that {weights} renders from them",
    )


def _splatfacto() -> MethodSpec:
    if not torch.cuda.is_available():
        raise ValueError(
            f"--methods {SPLATFACTO}: nerfstudio's own needs CUDA, found no GPU that PyTorch can use; take "
            f"{GAUSSIANS}, the same model on any device"
        )
    iterations = all_methods[SPLATFACTO].max_num_iterations
    note = f"nerfstudio's own from random points, on each scene's context views, {iterations} steps"
    return MethodSpec(SPLATFACTO, "splatfacto", SPLATFACTO, iterations=iterations, backend="gsplat", note=note)


def _network(name: str, path: Path, args: CompareOptions, whole_scenes: bool) -> MethodSpec:
    where, image_size = f"--runs {name}={path}", trained_image_size(path)
    try:
        path = weights_path(path)
    except ValueError as error:
        raise ValueError(f"--runs {name}={error}") from None
    if not path.exists():
        raise ValueError(f"{where}: no such file or folder")
    config = _config_beside(path)
    if config is None:
        if path.is_dir():
            raise ValueError(f"{where}: found no config.yml in it; expected the folder of a run, or a file of weights")
        if name not in network_methods():
            raise ValueError(f"{where}: a file of weights needs the name of a method: {', '.join(network_methods())}")
        method, weights, note = name, path, f"weights {path.name}"
    else:
        run = read_network_config(config, f"--runs {name}=")
        method, weights = run.method_name, path if path.suffix == ".ckpt" else last_checkpoint(config)
        if name in network_methods() and method != name:
            raise ValueError(f"{where}: found a run of {method}; give that row another name, or name {method}")
        image_size = run.pipeline.datamanager.image_size
        note = _trained_on(Path(run.pipeline.datamanager.data), args, whole_scenes)
    stat = weights.stat()
    spec = MethodSpec(
        name, "network", method, config=config and str(config.resolve()), weights=str(weights.resolve()),
        weights_stamp=(stat.st_size, stat.st_mtime_ns), image_size=image_size, note=note,
    )  # fmt: skip
    network_config(spec)  # what is wrong with the weights is better said now
    return spec


def _config_beside(path: Path) -> Optional[Path]:
    """The config.yml of a run, from its folder, the file itself, or one of its checkpoints."""
    candidates = (path / "config.yml", path if path.name == "config.yml" else None, path.parent.parent / "config.yml")
    found = (file for file in candidates[: 3 if path.suffix == ".ckpt" else 2] if file is not None and file.is_file())
    return next(found, None)


def _trained_on(trained: Path, args: CompareOptions, whole_scenes: bool) -> str:
    if trained.resolve() != args.data.resolve():
        return f"{OTHER_DATA}: {trained.name}"
    if whole_scenes:
        return "trained on other scenes of these data"
    on = "trained on this very capture: on more of its photos than the context views, "
    return on + ("not on the targets" if args.split is None else "and perhaps on the targets, which --split names")


def image_size(args: CompareOptions, specs: Sequence[MethodSpec]) -> tuple[int, int]:
    """The size of all images.

    Raises:
        ValueError: where the runs disagree, or a network cannot read images of this size.
    """
    configs = {spec.name: network_config(spec).pipeline for spec in specs if spec.kind == "network"}
    sizes = {tuple(config.datamanager.image_size) for config in configs.values()}
    if args.image_size is None and len(sizes) > 1:
        found = ", ".join(f"{name}: {' x '.join(map(str, c.datamanager.image_size))}" for name, c in configs.items())
        raise ValueError(f"--image-size: the runs were trained for different sizes ({found}); say which to compare at")
    size = args.image_size or next(iter(sizes), DEFAULT_SIZE)
    for name, config in configs.items():
        patch = config.model.network.patch_size
        if size[0] % patch or size[1] % patch:
            raise ValueError(f"--image-size {size[0]} {size[1]}: expected multiples of {patch}, the patches of {name}")
    return tuple(size)
