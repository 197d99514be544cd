"""Exports the weights that come with the package from a run, scores them, and writes their card.

    python -m scripts.release.model_card --load-config outputs/NAME/efficient-lvsm-plus-tiny/run/config.yml \\
        --data data/objects64 --scanned-data data/scanned64 --lens-data data/objects128 --commits COMMIT

Writes assets/efficient-lvsm-plus-tiny.safetensors and, beside it, the card (.md) and its pictures; those of before
stay until all is scored. Training that started from earlier weights (--pipeline.model.checkpoint pretrained) is a
further stage: the stages so far are in the .stages.json beside the weights, and the card names the commands of all.
The scores are of the exported file, from 1 to 16 context views on the test split; with all metrics that takes some
minutes, and is kept for the next time: the same weights are not scored twice on data of one name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import tyro
from nerfstudio.utils.eval_utils import eval_setup
from rich.progress import track

from elvsm_nerfstudio.evaluation.evaluator import Evaluator
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.evaluation.protocols import find_protocol
from elvsm_nerfstudio.evaluation.report import write_json, write_text
from elvsm_nerfstudio.evaluation.results import plot_against_views
from elvsm_nerfstudio.evaluation.scored_network import ScoredNetwork
from elvsm_nerfstudio.evaluation.training_curves import Curve, read_curves, read_scalars, write_curves
from elvsm_nerfstudio.files import whole
from elvsm_nerfstudio.nn.named_weights import PRETRAINED_FILE
from elvsm_nerfstudio.nn.weights import load_network, read_weights
from elvsm_nerfstudio.runs import (
    RunOptions,
    export_weights,
    last_checkpoint,
    make_run,
    network_methods,
    read_network_config,
)
from elvsm_nerfstudio.training.vgg_files import FILES
from scripts.release import card_text as text
from scripts.release.card_pictures import write_samples
from scripts.release.lens_scores import CONTEXT_VIEWS, lens_scores, lens_table, patch_border_ratio

ITERATION_TIME = "Train Iter (time)"
"""Name of the seconds of a step in a run's tensorboard log."""
PROTOCOL = "objects-1-to-16"
REDUCED = "objects-1-to-16-scored-at-64"
REDUCED_SIZE = 64
RANKED_VIEWS = 4
"""Context views by which objects are ranked."""
SHOWN = 3
"""Best, median and worst objects in the picture."""


@dataclass
class Args:
    """Options."""

    load_config: Path
    """config.yml of the run, trained with --vis tensorboard."""
    data: Path = Path("data/objects64")
    """The collection whose test split is scored."""
    scanned_data: Optional[Path] = None
    """A collection of `elvsm data scanned`, scored too."""
    lens_data: Optional[Path] = None
    """The collection in larger pictures, on whose test split other lenses are tried."""
    earlier_runs: tuple[Path, ...] = ()
    """config.yml of the runs, in order, that led from the weights of before to those that the run started from."""
    commits: tuple[str, ...] = ()
    """The commit at which the runs were trained, or that of each of them, the earlier ones first."""
    output: Path = Path("assets") / PRETRAINED_FILE
    """The weights to write; the card and its pictures are written beside it."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Precision of the weights in the file."""
    work_dir: Path = Path("outputs/model_card")
    """Folder for the evaluations."""


@dataclass
class Scored:
    """An evaluation of the weights on a collection."""

    results: Mapping[str, Any]
    details: Mapping[str, Any]
    sheets: Path
    scenes: Sequence[Mapping[str, str]]
    """All of the collection's."""

    def ranked(self) -> list[tuple[str, float]]:
        """Objects and their PSNR from RANKED_VIEWS context views, the worst one first."""
        values: dict[str, list[float]] = {}
        for row in self.details["images"]:
            if row["context_views"] == RANKED_VIEWS:
                values.setdefault(row["scene"], []).append(row["psnr"])
        return sorted(((scene, statistics.fmean(psnr)) for scene, psnr in values.items()), key=lambda item: item[1])

    def text(self) -> str:
        return text.evaluation_text(self.results, self.details["timing"])

    def objects(self) -> str:
        return text.objects_text(self.ranked(), RANKED_VIEWS)


def make_model_card(args: Args) -> Path:
    """Writes weights, card and pictures, and returns the card.

    Raises:
        ValueError: for a run that cannot be used, and where an evaluation fails.
        OSError: where something cannot be written.
    """
    config = read_network_config(args.load_config, "--load-config")
    curves = joined_curves([*args.earlier_runs, args.load_config])
    weights = exported(args)
    image_size = tuple(config.pipeline.datamanager.image_size)
    run = RunOptions(weights, method=config.method_name, image_size=image_size, output_dir=args.work_dir)
    scored = score(replace(run, data=args.data, protocol=PROTOCOL))
    reduced = ""
    if min(image_size) > REDUCED_SIZE:
        reduced = text.REDUCED.format(evaluation=score(replace(run, data=args.data, protocol=REDUCED)).text())
    scanned = ""
    if args.scanned_data is not None:
        other = score(replace(run, data=args.scanned_data, protocol=PROTOCOL))
        scanned = text.SCANNED.format(num_objects=len(other.ranked()), evaluation=other.text(), objects=other.objects())

    args.output.parent.mkdir(parents=True, exist_ok=True)
    counts = list(scored.results["by_context_views"])
    card = args.output.with_suffix(".md")
    pictures = {name: args.output.with_name(f"{args.output.stem}_{name}.png") for name in ("views", "samples", "curve")}
    by_views = {int(count): scores for count, scores in scored.results["by_context_views"].items()}
    plot_against_views(pictures["views"], "Held-out objects", by_views)
    shown = best_median_worst([scene for scene, _ in scored.ranked()])
    datamanager = config.pipeline.datamanager
    sheets = [scored.sheets / f"{scene}.png" for scene in shown]
    write_samples(pictures["samples"], sheets, image_size, len(counts))
    write_curves(pictures["curve"], curves)

    lenses = "" if args.lens_data is None else score_lenses(weights, args.lens_data, image_size[0], args.work_dir)
    grids = score_grids(replace(run, data=args.data, protocol=PROTOCOL))

    train = [scene for scene in _scenes(config.data) if scene["split"] == "train"]
    stages = stages_of(args)
    content = text.card(
        title=args.output.stem,
        method=config.method_name,
        file=args.output.name,
        size=f"{weights.stat().st_size / 1e6:.1f}",
        dtype=args.dtype,
        sha256=sha256(weights),
        network=config.pipeline.model.network.describe(),
        parameters=f"{sum(x.numel() for x in read_weights(weights).state.values()) / 1e6:.1f} M",
        image_size=f"{image_size[0]} x {image_size[1]}",
        sides=f"{image_size[0]} {image_size[1]}",
        steps=" + ".join(f"{stage['steps']:,}" for stage in stages),
        scenes=str(datamanager.scenes_per_batch),
        context=" to ".join(map(str, sorted(set(datamanager.context_view_bounds)))),
        target=str(datamanager.num_target_views),
        validation_views=str(max(datamanager.context_view_bounds)),
        hours=" + ".join(f"{stage['hours']:.1f}" for stage in stages),
        evaluation=scored.text(),
        objects=scored.objects(),
        num_objects=str(len(scored.ranked())),
        counts=", ".join(counts),
        creators=creators(scored.scenes, shown),
        views_picture=text.relative(pictures["views"], card),
        samples_picture=text.relative(pictures["samples"], card),
        curve_picture=text.relative(pictures["curve"], card),
        curve_stages=text.last_stages(len(args.earlier_runs) + 1, len(stages)),
        reduced=reduced,
        scanned=scanned,
        lenses=lenses,
        grids=grids,
        stages=text.stages_text(stages),
        train_objects=str(len(train)),
        credits=text.credits_table(train),
    )
    if weights != args.output:
        with whole(args.output) as partial:
            shutil.copyfile(weights, partial)
    write_json(stages_file(args.output), stages)
    write_text(card, content)
    return card


def joined_curves(runs: Sequence[Path]) -> dict[str, Curve]:
    """The curves of runs, given by their config.yml, of which each goes on from the one before."""
    joined: dict[str, Curve] = {}
    steps = minutes = 0.0
    for run in runs:
        curves = read_curves(run.parent)
        for name, curve in curves.items():
            later = [{**row, "step": row["step"] + steps, "minutes": row["minutes"] + minutes} for row in curve]
            joined.setdefault(name, []).extend(later)
        steps += last_step(run) + 1
        minutes += max(row["minutes"] for curve in curves.values() for row in curve)
    return joined


def stages_file(weights: Path) -> Path:
    """Where the stages of the training of a file of weights are kept."""
    return weights.with_suffix(".stages.json")


def stages_of(args: Args) -> list[dict[str, Any]]:
    """All stages of the training that the run is the end of: those that led to the weights of before, if it began with
    these, and its own.

    Raises:
        ValueError: where it started from weights whose stages are not known.
    """
    runs = [*args.earlier_runs, args.load_config]
    configs = [read_network_config(run, "--load-config") for run in runs]
    commits = args.commits or (None,)
    if len(commits) not in (1, len(runs)):
        raise ValueError(f"--commits: found {len(commits)}; expected one, or one for each of the {len(runs)} runs")
    stages = []
    for number, (run, config, commit) in enumerate(zip(runs, configs, commits * (len(runs) // len(commits)))):
        train = f"{text.training_command(config, _method(config))} \\\n    --timestamp {config.timestamp}"
        commands = [text.data_command(config.data)]
        if number:
            start = config.pipeline.model.checkpoint
            commands.append(f"elvsm export --load-config {runs[number - 1]} --output {start}")
        if (network := config.pipeline.model.perceptual.network) is not None:
            commands.append(FILES[network].fetch)
        commands.append(train)
        stopped = last_step(run) + 1 < config.max_num_iterations
        stages.append({"commands": commands, "commit": commit, "stopped": stopped, **_costs(run)})
    first = configs[0].pipeline.model.checkpoint
    if first is None:
        return stages
    file = stages_file(args.output)
    if not file.is_file():
        raise ValueError(
            f"{runs[0]} started from weights ({first}), and {file} does not exist; expected the stages of their "
            "training there"
        )
    # The card of these stages may be made anew.
    made = [stage["commands"] for stage in stages]
    return [*(stage for stage in json.loads(file.read_text()) if stage["commands"] not in made), *stages]


def last_step(run: Path) -> int:
    """The step of a run's last checkpoint."""
    return int(last_checkpoint(run).stem.removeprefix("step-"))


def _method(config: Any) -> Any:
    return network_methods()[config.method_name]


def _costs(run: Path) -> dict[str, float]:
    steps = last_step(run) + 1
    seconds = statistics.median(read_scalars(run.parent, [ITERATION_TIME])[ITERATION_TIME].values())
    return {"steps": steps, "seconds_per_step": round(seconds, 2), "hours": round(steps * seconds / 3600, 1)}


def score_lenses(weights: Path, data: Path, size: int, work_dir: Path) -> str:
    """The card's section on other lenses, scored unless that was done before."""
    done = work_dir / f"lenses-{data.name}-{content_hash(weights)[:12]}.json"
    if not done.exists():
        write_json(done, lens_scores(load_network(weights).eval(), data, size))
    return text.LENSES.format(table=lens_table(json.loads(done.read_text())), context=CONTEXT_VIEWS)


def exported(args: Args) -> Path:
    """The file with the run's weights: a new one in the folder for evaluations, or the output where it holds the same
    ones. (Their bytes would be others, as safetensors orders its header as it likes.)"""
    new = args.work_dir / args.output.name
    export_weights(args.load_config, new, args.dtype)
    return args.output if args.output.is_file() and is_as(args.output, new) else new


def is_as(before: Path, now: Path) -> bool:
    """Whether two files hold the same weights."""
    try:
        return content_hash(before) == content_hash(now)
    except ValueError:  # an earlier version's file, which this one cannot read
        return False


def score(options: RunOptions) -> Scored:
    """Scores weights on a collection's test split, unless that was done before.

    Raises:
        ValueError: where ns-eval fails.
    """
    folder = options.output_dir / _name(options)
    done = folder / "evaluation"
    if not done.exists():
        partial = folder / "evaluation.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [Path(sys.executable).parent / "ns-eval", "--load-config", _run(options)]
        command += ["--output-path", partial / "results.json", "--render-output-path", partial / "pictures"]
        if subprocess.run([str(part) for part in command]).returncode != 0:
            raise ValueError(f"ns-eval of {options.weights} on {options.data} failed; its messages are above")
        partial.rename(done)
    return Scored(
        results=json.loads((done / "results.json").read_text())["results"],
        details=json.loads((done / "results.images.json").read_text()),
        sheets=done / "pictures",
        scenes=_scenes(options.data),
    )


def score_grids(options: RunOptions) -> str:
    """The card's section on patches that show, scored unless that was done before: renders as they are, and averaged
    over four grids of patches."""
    folder = options.output_dir / f"{_name(options)}-grids"
    done = folder / "grids.json"
    if not done.exists():
        _, pipeline, _, _ = eval_setup(_run(options), test_mode="inference")
        protocol = replace(find_protocol(options.protocol), context_views=(RANKED_VIEWS,))
        patch_size = pipeline.model.config.network.patch_size
        images: dict[str, list[torch.Tensor]] = {name: [] for name in ("photos", "1", "4")}
        scored = Evaluator(ScoredNetwork(pipeline.model), pipeline.datamanager, protocol)
        for entry in track(pipeline.datamanager.eval_entries, description="Grids of patches"):
            scene = scored.scene(entry)
            _, memory, _ = next(scored.method.memories(scene.views, protocol))
            images["photos"].append(scene.views.target.rgb[0])
            for grids in (1, 4):
                pipeline.model.config.shifted_grids = grids
                images[str(grids)].append(pipeline.model.render_frames(memory, scene.cameras))
        photos = torch.cat(images.pop("photos"))
        rows = {
            name: {
                "psnr": statistics.fmean(float(psnr(*pair)) for pair in zip(torch.cat(renders), photos)),
                "borders": patch_border_ratio(torch.cat(renders), patch_size),
            }
            for name, renders in images.items()
        }
        write_json(done, {"rows": rows, "photos": patch_border_ratio(photos, patch_size)})
    return text.grids_text(json.loads(done.read_text()), RANKED_VIEWS)


def _run(options: RunOptions) -> Path:
    """config.yml of the run that is scored, made unless it is there."""
    name = _name(options)
    made = next((options.output_dir / name).glob("*/run/config.yml"), None)
    return made or make_run(replace(options, name=name))


def _name(options: RunOptions) -> str:
    """Of what comes out of scoring: with the data's names and what the weights are."""
    return f"{options.data.name}-{options.protocol}-{content_hash(options.weights)[:12]}"


def _scenes(collection: Path) -> list[dict[str, str]]:
    return json.loads((collection / "scenes.json").read_text())["scenes"]


def best_median_worst(ranked: Sequence[str]) -> list[str]:
    """The best, the median and the worst objects, without repeating any where there are few.

    Args:
        ranked: objects, the worst one first.
    """
    middle = max(0, len(ranked) // 2 - SHOWN // 2)
    chosen = [*reversed(ranked[-SHOWN:]), *reversed(ranked[middle : middle + SHOWN]), *reversed(ranked[:SHOWN])]
    return list(dict.fromkeys(chosen))


def creators(scenes: Sequence[Mapping[str, str]], shown: Sequence[str]) -> str:
    """Who made the objects in the picture, and their licences."""
    of = {scene["name"]: scene for scene in scenes}
    makers: dict[str, list[str]] = {}
    for name in shown:
        makers.setdefault(of[name].get("licence", "unknown"), []).append(of[name].get("creator", "unknown"))
    return "; ".join(f"{', '.join(dict.fromkeys(names))} ({licence})" for licence, names in makers.items())


def content_hash(weights: Path) -> str:
    """SHA-256 of a network's config and tensors."""
    read = read_weights(weights)
    digest = hashlib.sha256(repr(read.config).encode())
    for name, tensor in sorted(read.state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        print(make_model_card(args))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
