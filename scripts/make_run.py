"""Makes a run directory from the weights of another one, for other data or another protocol, without training.

nerfstudio's programs take everything from a run's config.yml: `ns-eval`, `ns-render` and `ns-viewer` then work on the
new run as on any other.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import tyro
import yaml
from nerfstudio.engine.trainer import TrainerConfig

from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.protocols import find_protocol


@dataclass
class Args:
    """Options."""

    from_run: Path
    """config.yml of the run whose weights are taken."""
    data: Optional[Path] = None
    """Other data: anything that ns-train takes."""
    protocol: Optional[str] = None
    """How ns-eval shall score; by the run's own options if absent."""
    evaluation_index: Optional[Path] = None
    """JSON with the context and target frames of each evaluated scene."""
    num_context_views: Optional[int] = None
    """Context views where evaluation has no index and no protocol."""
    scene: Optional[str] = None
    """Scene that the viewer and ns-render show."""
    output_dir: Path = Path("outputs")
    """Folder of the new run's experiment."""
    name: Optional[str] = None
    """Name of the new run's experiment; from_run's, the data and the protocol if absent."""


def make_run(args: Args) -> Path:
    """Writes the run and returns its config.yml.

    Raises:
        ValueError: for a run without weights, unknown protocols and data that cannot be opened.
    """
    if not args.from_run.is_file():
        raise ValueError(f"--from-run {args.from_run} does not exist; expected the config.yml of a run")
    config = yaml.load(args.from_run.read_text(), Loader=yaml.Loader)
    if not isinstance(config, TrainerConfig) or not hasattr(config.pipeline, "protocol"):
        raise ValueError(f"--from-run {args.from_run} is no config of a method of this package")
    checkpoints = sorted((args.from_run.parent / "nerfstudio_models").glob("step-*.ckpt"))
    if not checkpoints:
        raise ValueError(f"{args.from_run.parent}/nerfstudio_models holds no checkpoint; train the run first")

    datamanager = config.pipeline.datamanager
    config.pipeline.protocol = args.protocol and find_protocol(args.protocol).name
    if args.data is not None:
        datamanager.data, datamanager.evaluation_index, datamanager.scene = args.data, None, None
        datamanager.context_frames = None
        config.data = args.data
    if args.evaluation_index is not None:
        datamanager.evaluation_index = args.evaluation_index
    if args.num_context_views is not None:
        datamanager.num_context_views = args.num_context_views
    if args.scene is not None:
        datamanager.scene = args.scene
    SceneCollection.open(Path(datamanager.data), datamanager.dataparser)

    parts = [config.experiment_name, args.data and args.data.stem, args.protocol]
    config.experiment_name = args.name or "-".join(part for part in parts if part)
    config.output_dir = args.output_dir
    config.timestamp = "run"
    folder = config.get_base_dir()
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another --name or delete it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "nerfstudio_models").mkdir(parents=True)
    _link_or_copy(checkpoints[-1], partial / "nerfstudio_models" / checkpoints[-1].name)
    (partial / "config.yml").write_text(yaml.dump(config))
    os.rename(partial, folder)
    return folder / "config.yml"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        print(make_run(args))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
