"""Trains variants of the method one after another for equal time and scores them alike.

    python -m scripts.study.run --data data/objects64 --output outputs/study --minutes 15

The variants are in scripts/study/variants.py. Each is calibrated first, so that its schedule ends when its time does;
never do two train at once. Validation scenes are rendered from 1 to 16 context views of the same order. Called again
with the same --output, what is done is kept, and a training that was killed goes on from its checkpoint; variants,
seeds and --score-test can be added. OUTPUT/study.md has the tables, scripts/study/layout.py says what else is there.
"""

from __future__ import annotations

import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from elvsm_nerfstudio.compare.layout import dataparser_config
from elvsm_nerfstudio.compare.methods import device_to_use
from elvsm_nerfstudio.data.evaluation_views import choose_evaluation_views
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.report import write_json, write_text
from elvsm_nerfstudio.evaluation.results import code_version
from elvsm_nerfstudio.evaluation.timing import machine
from scripts.study.layout import Layout, Settings, keep_settings, read_json
from scripts.study.report import markdown, write_curves, write_pictures, write_views
from scripts.study.scoring import CURVE_VIEWS, Scorer, view_rule
from scripts.study.training import PARTS, TrainingError, find_plan, make_plan, train
from scripts.study.variants import VARIANTS, Variant, find_variants

console = Console()


@dataclass
class Args:
    """Options."""

    data: Path
    """A collection with train, val and test scenes."""
    output: Path
    """Folder for everything."""
    variants: tuple[str, ...] = ()
    """Names in scripts/study/variants.py; all of them if absent."""
    seeds: tuple[int, ...] = (42,)
    """Of weights and data: each variant is trained once with each."""
    minutes: float = 15.0
    """Training time of each, on a core of its own."""
    steps: Optional[int] = None
    """Instead of what fits into --minutes: as many steps for each, a multiple of 8."""
    threads: int = 1
    """Threads of training and scoring."""
    context_views: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of context views to score with, 4 among them."""
    num_target_views: int = 4
    """Scored targets of a scene."""
    score_test: bool = False
    """Scores the test split too, once everything is trained."""
    train_options: str = ""
    """More options of ns-train for all variants, in quotes: --train-options="--ema-decay 0.999"."""


def run_study(args: Args) -> dict[str, Any]:
    """Trains, scores and reports; returns what is in study.json.

    Raises:
        ValueError: for options and data that cannot be used, before anything is run.
    """
    variants = _checked(args)
    layout = Layout(args.output.resolve())
    settings = Settings(
        data=str(args.data.resolve()),
        minutes=args.minutes,
        steps=args.steps,
        threads=args.threads,
        context_views=tuple(sorted(set(args.context_views))),
        num_target_views=args.num_target_views,
        train_options=args.train_options,
    )
    _check_data(settings, args.score_test)
    torch.set_num_threads(args.threads)
    with layout.locked() as lock:
        keep_settings(layout, settings)
        for variant in VARIANTS:  # also of those that are only reported
            find_plan(layout, settings, variant)
        study = Study(layout, settings, lock)
        study.run(variants, args.seeds, args.score_test)
        return study.report()


def _checked(args: Args) -> list[Variant]:
    variants = find_variants(args.variants)
    if args.minutes <= 0 or args.threads < 1 or args.num_target_views < 1:
        raise ValueError("--minutes, --threads and --num-target-views: expected numbers above 0")
    if args.steps is not None and (args.steps < PARTS or args.steps % PARTS):
        raise ValueError(f"--steps {args.steps}: expected a multiple of {PARTS}, for as many checkpoints")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: expected different numbers, at least one")
    if min(args.context_views, default=0) < 1 or CURVE_VIEWS not in args.context_views:
        raise ValueError(
            f"--context-views {' '.join(map(str, args.context_views))}: expected numbers of at least 1, "
            f"{CURVE_VIEWS} among them, which curves are of"
        )
    return variants


def _check_data(settings: Settings, score_test: bool) -> None:
    """Raises ValueError where a split is missing, or a scene has too few views: better now than after the training."""
    collection = SceneCollection.open(Path(settings.data), dataparser_config(None))
    for split in ("train", "val", "test") if score_test else ("train", "val"):
        entries = collection.split(split)
        if not entries:
            raise ValueError(
                f"--data {settings.data}: has no scene in its {split} split; give one to it in scenes.json"
            )
        for entry in entries if split != "train" else []:
            choose_evaluation_views(collection.load(entry), None, view_rule(settings))


class Study:
    """A study's folder, and the pieces of work that fill it, one after another."""

    def __init__(self, layout: Layout, settings: Settings, lock: int):
        self.layout, self.settings, self.lock = layout, settings, lock
        self.scorer = Scorer(settings)
        self.errors: dict[str, str] = {}

    def run(self, variants: Sequence[Variant], seeds: Sequence[int], score_test: bool) -> None:
        """Does what is not done yet. A variant that fails is reported, and the next one follows."""
        with _progress() as bar:
            task = bar.add_task("", total=len(variants) * len(seeds) * (2 if score_test else 1), what="", now="")
            # Seed by seed: what decides for one seed is known before the next begins.
            for seed in seeds:
                for variant in variants:
                    if variant.name not in self.errors:
                        self._train_and_score(variant, seed, bar, task)
                        self.report()
                    bar.advance(task)
            if score_test:
                for seed in seeds:
                    for variant in variants:
                        bar.update(task, what=f"{variant.name}, seed {seed}", now="test split")
                        if variant.name not in self.errors:
                            self.scorer.scores(self.layout, variant, seed, "test")
                        bar.advance(task)

    def _train_and_score(self, variant: Variant, seed: int, bar: Progress, task) -> None:
        def tell(what: str):
            title = f"{variant.name}, seed {seed}"
            bar.update(task, what=title, now=what)
            return lambda seconds: bar.update(task, now=f"{what}, {seconds / 60:.1f} min")

        layout, settings = self.layout, self.settings
        try:
            plan = make_plan(layout, settings, variant, seed, self.lock, tell("calibration"))
            train(layout, settings, variant, seed, plan, self.lock, tell(f"{plan.steps} steps"))
            tell("validation split")
            self.scorer.curve(layout, variant, seed)
            self.scorer.scores(layout, variant, seed, "val")
        except (TrainingError, ValueError) as error:  # of this variant, since the data have been looked at
            console.print(f"{variant.name} failed: {error}", style="yellow", markup=False, soft_wrap=True)
            self.errors[variant.name] = str(error)

    def report(self) -> dict[str, Any]:
        """Writes study.json, the tables, plots and pictures of everything in the folder, and returns the first."""
        layout, result = self.layout, self.result()
        write_json(layout.root / "study.json", result)
        write_text(layout.root / "study.md", markdown(result))
        scored = {
            row["name"]: [int(seed) for seed, run in row["seeds"].items() if "val" in run] for row in result["variants"]
        }
        if pictures := [layout.pictures(name, seeds[0]) for name, seeds in scored.items() if seeds]:
            write_curves(layout.root / "curves.png", result)
            write_views(layout.root / "views.png", result)
            write_pictures(layout.root / "pictures.png", layout.baseline_pictures, pictures)
        return result

    def result(self) -> dict[str, Any]:
        """Everything that is known, for study.json."""
        layout, device = self.layout, device_to_use()
        rows, config = [], None
        for variant in VARIANTS:
            plan = read_json(layout.plan(variant.name))
            if plan is None and variant.name not in self.errors:
                continue
            about = {"name": variant.name, "tests": variant.tests, "method": variant.method}
            rows.append({**about, "plan": plan, "seeds": {}, "error": self.errors.get(variant.name)})
            for seed in layout.seeds(variant.name):
                record = {"training": read_json(layout.training(variant.name, seed))}
                if (curve := read_json(layout.curve(variant.name, seed))) is not None:
                    record["curve"] = curve
                    config = layout.run(variant, seed) / "config.yml"
                for split in ("val", "test"):
                    if layout.scores(variant.name, seed, split).exists():
                        record[split] = self.scorer.scores(layout, variant, seed, split)
                rows[-1]["seeds"][str(seed)] = record
        splits = {split for row in rows for run in row["seeds"].values() for split in ("val", "test") if split in run}
        return {
            "made": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "scripts.study.run", *sys.argv[1:]]),
            "code": code_version(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "nerfstudio", "lpips")},
            },
            "machine": {**machine(device), "device": str(device)},
            "settings": asdict(self.settings),
            "variants": rows,
            "baselines": {split: self.scorer.baselines(layout, split, config) for split in sorted(splits)},
        }


def _progress() -> Progress:
    columns = (
        TextColumn("[green]{task.fields[what]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training is ended too
    try:
        result = run_study(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    console.print(markdown(result), markup=False, soft_wrap=True)
    console.print(
        f"{args.output}/study.md, study.json, curves.png, views.png, pictures.png", markup=False, soft_wrap=True
    )
    if failed := [row["name"] for row in result["variants"] if row["error"]]:
        sys.exit(f"error: {', '.join(failed)} failed; called again, it is tried again")


if __name__ == "__main__":
    main()
