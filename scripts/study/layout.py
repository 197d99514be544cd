"""What a study's folder holds.

settings.json                            what all variants have in common; never changes
runs/VARIANT-seed_42/METHOD/run/         a training as ns-train leaves it, without its earlier checkpoints once scored
variants/VARIANT/plan.json               how many steps, and the calibration that says so
variants/VARIANT/log.txt                 what ns-train printed
variants/VARIANT/seed_42/training.json   how it went: commands, times, load
variants/VARIANT/seed_42/curve.json      validation PSNR of every checkpoint
variants/VARIANT/seed_42/val.json        scores of the last one, a row for every image; test.json alike
variants/VARIANT/seed_42/pictures.png    its renders of some validation scenes
baselines/val.json, test.json, pictures.png the same of what needs no learning
study.json, study.md, curves.png, views.png, pictures.png
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from elvsm_nerfstudio.evaluation.report import write_json
from scripts.study.variants import Variant

Split = Literal["val", "test"]


@dataclass(frozen=True)
class Settings:
    """What all variants have in common."""

    data: str
    minutes: float
    steps: Optional[int]
    threads: int
    context_views: tuple[int, ...]
    num_target_views: int
    train_options: str

    def options(self) -> dict[str, str]:
        """``train_options`` by name, without the leading dashes.

        Raises:
            ValueError: for something else than options and their values.
        """
        options: dict[str, str] = {}
        name = None
        for part in shlex.split(self.train_options):
            if part.startswith("--"):
                name = part.removeprefix("--")
                options[name] = ""
            elif name is None:
                raise ValueError(f"--train-options: found {part!r}; expected an option of ns-train, e.g. --ema-decay")
            else:
                options[name] = f"{options[name]} {part}".strip()
        return options


@dataclass(frozen=True)
class Layout:
    """Paths in a study's folder."""

    root: Path

    def folder(self, variant: str) -> Path:
        return self.root / "variants" / variant

    def plan(self, variant: str) -> Path:
        return self.folder(variant) / "plan.json"

    def log(self, variant: str) -> Path:
        return self.folder(variant) / "log.txt"

    def training(self, variant: str, seed: int) -> Path:
        return self.folder(variant) / f"seed_{seed}" / "training.json"

    def curve(self, variant: str, seed: int) -> Path:
        return self.training(variant, seed).with_name("curve.json")

    def scores(self, variant: str, seed: int, split: Split) -> Path:
        return self.training(variant, seed).with_name(f"{split}.json")

    def pictures(self, variant: str, seed: int) -> Path:
        return self.training(variant, seed).with_name("pictures.png")

    def experiment(self, variant: str, seed: int) -> str:
        return f"{variant}-seed_{seed}"

    def run(self, variant: Variant, seed: int) -> Path:
        return self.root / "runs" / self.experiment(variant.name, seed) / variant.method / "run"

    def baselines(self, split: Split) -> Path:
        return self.root / "baselines" / f"{split}.json"

    @property
    def baseline_pictures(self) -> Path:
        return self.root / "baselines" / "pictures.png"

    def seeds(self, variant: str) -> list[int]:
        """Seeds of which something is there."""
        return sorted(int(path.name.removeprefix("seed_")) for path in self.folder(variant).glob("seed_*"))

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keeps other studies out of the folder for as long as this process or a training of it lives: gives the file
        descriptor that trainings inherit.

        Raises:
            ValueError: where another one is at work.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield descriptor
        except BlockingIOError:
            raise ValueError(
                f"--output {self.root}: a study, or a training that it left behind, is at work there; wait for it or "
                "end it"
            ) from None
        finally:
            os.close(descriptor)


def keep_settings(layout: Layout, settings: Settings) -> None:
    """Writes what is studied on, or checks that it is what has been studied on here before.

    Raises:
        ValueError: naming the option that differs.
    """
    path = layout.root / "settings.json"
    now = json.loads(json.dumps(asdict(settings)))
    before = read_json(path)
    if before is None:
        write_json(path, now)
        return
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: {layout.root} holds a study with {before[name]}; expected the same, "
                f"found {value}. Choose another --output"
            )


def read_json(path: Path) -> Optional[Any]:
    """A file's content; None where there is none."""
    return json.loads(path.read_text("utf8")) if path.exists() else None
