"""What a model card says: the training's command, tables of data and of scores, and the text around them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

Scores = Mapping[str, float]
"""Averages of one number of context views, as ns-eval writes them."""

_ELSEWHERE = {
    "_target", "data", "experiment_name", "timestamp", "output_dir", "load_dir", "load_step", "load_checkpoint",
    "load_config",
}  # fmt: skip
"""Fields that say where a run lies and what it went on from; not its recipe."""

LIMITS = """\
- Made for objects on white, seen from around. On photos of rooms and landscapes it starts far from useful: train it on.
- {image_size} pixels, or as many in another aspect. Much larger renders work, but a patch then covers an angle that it
  has not seen.
- It regresses: where the context views leave something open, it paints the mean of what may be there, a blur, over
  which the grid of its patches can show as a faint weave.
- Trained on furniture, much of it in flat colours, in one fixed light: thin parts, fine patterns and print come out
  worst.
- Cameras must be known and exact. It estimates none."""


def training_command(config: Any, default: Any) -> str:
    """The ns-train command of a run: what its config has that its method's has not.

    Args:
        config: of the run.
        default: the registered config of the method.
    """
    options = [*_differences(config, default), ("data", str(config.data)), ("experiment-name", config.experiment_name)]
    return " \\\n    ".join([f"ns-train {config.method_name}", *(f"--{name} {value}" for name, value in options)])


def data_command(data: Path) -> str:
    """The command that renders a collection of objects.

    Args:
        data: the collection, as the run names it.
    """
    collection = json.loads((data / "scenes.json").read_text())
    known = {name: collection[name] for name in ("resolution", "views_per_object") if name in collection}
    options = [f"--{name.replace('_', '-')} {value}" for name, value in known.items()]
    return " ".join(["elvsm data objects", f"--output {data}", *options])


def stages_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """The stages of a training, each with its commands."""
    parts = []
    for number, stage in enumerate(stages, start=1):
        at = f", at commit {stage['commit']}" if stage["commit"] else ""
        at += "; stopped there" if stage.get("stopped") else ""
        commands = "\n".join(stage["commands"])
        parts.append(
            f"Stage {number}: {stage['steps']:,} steps, {stage['seconds_per_step']:.2f} s each{at}.\n\n"
            f"```bash\n{commands}\n```"
        )
    return "\n\n".join(parts)


def _differences(config: Any, default: Any, prefix: str = "") -> list[tuple[str, str]]:
    names = [field.name for field in fields(config)] if is_dataclass(config) else list(config)
    get = getattr if is_dataclass(config) else lambda mapping, name: mapping.get(name)
    options = []
    for name in names:
        if name in _ELSEWHERE:
            continue
        value, other = get(config, name), get(default, name)
        option = f"{prefix}{name.replace('_', '-')}"
        alike = type(value) is type(other) and (not isinstance(value, dict) or set(value) == set(other))
        if alike and (is_dataclass(value) or isinstance(value, dict)):
            options += _differences(value, other, f"{option}.")
        elif value != other:
            options.append((option, _as_arguments(value)))
    return options


def _as_arguments(value: Any) -> str:
    if isinstance(value, dict):
        value = tuple(chain.from_iterable(value.items()))
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def credits_table(scenes: Sequence[Mapping[str, str]]) -> str:
    """Libraries, their licence, and their creators, each with the number of objects.

    Args:
        scenes: of a collection's scenes.json.
    """
    rows = ["| library | licence | objects | creators (objects, where more than one) |", "|---|---|---|---|"]
    for library in sorted({scene["library"] for scene in scenes}):
        listed = [scene for scene in scenes if scene["library"] == library]
        licences = ", ".join(sorted({scene["licence"] for scene in listed}))
        counts = Counter(scene["creator"] for scene in listed)
        creators = ", ".join(
            f"{name} ({counts[name]})" if counts[name] > 1 else name for name in sorted(counts, key=str.casefold)
        )
        rows.append(f"| {library} | {licences} | {len(listed)} | {creators} |")
    return "\n".join(rows)


def scores_table(by_views: Mapping[str, Scores]) -> str:
    """The model's scores beside the baselines', for each number of context views."""
    columns = {"SSIM": "ssim", "FLIP": "flip", "LPIPS (VGG)": "lpips_vgg", "LPIPS (Alex)": "lpips_alex"}
    present = {title: key for title, key in columns.items() if all(key in scores for scores in by_views.values())}
    rows = [f"| context views | PSNR | {' | '.join(present)} | PSNR, copying the nearest | PSNR, mean of context |"]
    rows.append("|---" * (len(present) + 4) + "|")
    for count, scores in by_views.items():
        cells = [_spread(scores, "psnr", 2), *(_spread(scores, key, 3) for key in present.values())]
        cells += [_spread(scores, f"psnr_{baseline}", 2) for baseline in ("copy_nearest", "mean_of_context")]
        rows.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(scores: Scores, key: str, digits: int) -> str:
    return f"{scores[key]:.{digits}f} +- {scores[f'{key}_std']:.{digits}f}"


def evaluation_text(results: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """A table of scores, and what was scored."""
    by_views, record = results["by_context_views"], results["record"]
    first = next(iter(by_views.values()))
    times = timing["by_context_views"]
    costs = ", ".join(f"{times[count]['encode_ms']['median']:.0f}" for count in by_views)
    render = next(iter(times.values()))["render_ms"]["median"]
    return f"""{scores_table(by_views)}

{first["num_scenes"]:.0f} objects, {first["num_images"]:.0f} images for each number of views; +- is the standard
deviation over images. Protocol `{record["protocol"]["name"]}`, code {_version(record["code"])}, fingerprint of all
pixels and cameras `{record["data"]["fingerprint"][:16]}`. Encoding all context views took {costs} ms for
{", ".join(by_views)} of them, a render from one {render:.0f} ms (medians; {timing["device"]}, threads:
{timing["threads"]})."""


def _version(code: Mapping[str, Any]) -> str:
    return f"{code['version']}, commit {code['commit'] or 'unknown'}"


def objects_text(ranked: Sequence[tuple[str, float]], views: int) -> str:
    """The spread over objects."""
    (worst, low), (middle, median), (best, high) = ranked[0], ranked[len(ranked) // 2], ranked[-1]
    return (
        f"By object, from {views} context views: worst {low:.2f} dB ({worst}), median {median:.2f} dB ({middle}), best "
        f"{high:.2f} dB ({best})."
    )


def grids_text(scores: Mapping[str, Any], views: int) -> str:
    """The section on patches that show."""
    rows = [f"| {grids} | {row['borders']:.2f} | {row['psnr']:.2f} |" for grids, row in scores["rows"].items()]
    return GRIDS.format(context=views, photos=scores["photos"], rows="\n".join(rows))


def card(**parts: str) -> str:
    """The whole card."""
    return CARD.format(limits=LIMITS.format(image_size=parts["image_size"]), **parts)


CARD = """# {title}

The weights that come with this package, `pretrained` wherever a file of weights is asked for.
Written by `scripts/release/model_card.py`; every number below is of this file, as shipped.

| | |
|---|---|
| file | `{file}`, {size} MB, {dtype}, SHA-256 `{sha256}` |
| network | {network}, {parameters} parameters |
| size | {image_size} px, white background |
| trained | {steps} steps, the last ones of {scenes} scenes, {context} context and {target} target views |
| training time | {hours} hours on one CPU core |
| licence | Apache-2.0, as the code; the pictures it learned from are [credited below](#data) |

## Use

```bash
elvsm run --weights pretrained --data YOUR_CAPTURE     # prints a config.yml for ns-eval, ns-viewer
ns-train {method} --pipeline.model.checkpoint pretrained \\
    --pipeline.datamanager.image-size {sides} --data YOUR_DATA         # trains on
```

## Held-out objects

{evaluation}

![PSNR against context views]({views_picture})

{objects}

![Best, median and worst objects]({samples_picture})

*The three best, three median and three worst of all {num_objects} objects, from top to bottom. Each row: four context
views, a target, and what the model renders for it from {counts} context views. Furniture by {creators}.*
{reduced}{scanned}{lenses}{grids}
## Limits

{limits}

## Training

{stages}

Trained on the train split alone. A stage that starts from `pretrained` starts from the weights that the stage before
left in this place.

![Training curve]({curve_picture})

*{curve_stages}. Training batches have {context} context views, validation objects {validation_views}.*

## Data

{train_objects} objects of the train split, rendered by `elvsm data objects` from Debian's
`sweethome3d-furniture`. CC-BY asks that those who made them are named:

{credits}
"""

LENSES = """
## Other lenses

The same test objects from pictures of twice the size, 4 context views and 4 targets each, seen through other lenses:
PSNR beside that of the render through the collection's own lens on the same pixels.

{table}
"""

GRIDS = """
## Patches

Patches show where neighbouring pixels differ more across their borders than inside. Renders of the test objects from
{context} views, as they are and with `--pipeline.model.shifted-grids 4`, which averages renders on four grids of
patches (`elvsm show` does); in the photos the ratio is {photos:.2f}.

| grids | differences across borders over those inside | PSNR |
|---|---|---|
{rows}
"""

REDUCED = """
## The same, reduced to 64 x 64

Renders and photos are reduced to 64 x 64 before they are compared, for comparing with models of that size.

{evaluation}
"""

SCANNED = """
## Objects of another source

{num_objects} scanned things with photo textures (`elvsm data scanned`), rendered alike, zero-shot: nothing
was trained on them or chosen by these scores.

{evaluation}

{objects}
"""


def relative(path: Path, card: Path) -> str:
    """A file's name as the card links to it."""
    return path.relative_to(card.parent).as_posix()


def last_stages(shown: int, stages: int) -> str:
    """Which of the stages a curve shows: the last ones."""
    if shown == stages:
        return "All stages" if stages > 1 else "The whole training"
    return f"Stages {stages - shown + 1} to {stages}" if shown > 1 else f"Stage {stages}"
