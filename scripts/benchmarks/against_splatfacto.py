"""Compares a network, splatfacto-sparse and splatfacto-lvsm, which stands between them, on objects and on photos.

    python -m scripts.benchmarks.against_splatfacto --objects data/objects128_24 --captures ../shared/data \\
        --output outputs/against_splatfacto --results docs/results/against_splatfacto.json \\
        --pictures docs/pictures/against_splatfacto --page docs/benchmarks.md \\
        --summary-page docs/splatfacto-lvsm.md --beside "nothing"

Every fifth object of the test split, and the captures mary_rose, fox and chair, as far as they are there; each is an
`elvsm compare` of its own, in a folder of its own. Called again, what is done is kept: methods that do not depend on
weights can be run first (--methods), and the others when there are new weights. Writes the JSON, the tables into the
page, PICTURES.png (PSNR and LPIPS against the number of context views), PICTURES_scenes.png (the first target of
every scene) and PICTURES_turning.webp (the objects from all around, from 4 context views). In a JSON that is there
already, rows of methods that are not compared now stay, where the views are the same. Without --objects and --captures
it compares nothing, and writes the pages' tables anew from the JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import tyro

from elvsm_nerfstudio.compare.comparison import compare
from elvsm_nerfstudio.compare.layout import Layout, dataparser_config
from elvsm_nerfstudio.compare.options import CompareOptions
from elvsm_nerfstudio.compare.plots import method_colours
from elvsm_nerfstudio.compare.scoring import METRICS, cost, frame_file, read_picture
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.baselines import BASELINES
from elvsm_nerfstudio.evaluation.report import sheet, write_figure, write_image, write_json
from scripts.benchmarks.captures import CAPTURES
from scripts.benchmarks.pages import write_part
from scripts.benchmarks.splatfacto_tables import SHOWN, summary, tables
from scripts.benchmarks.turning import PANEL, pictured, turn, write_animation

EVERY = 5
"""Every fifth object is compared on."""
TURN_CONTEXT_VIEWS, TURN_FRAMES = 4, 24
"""Context views that the animation is made from, and its number of frames."""


@dataclass
class Args:
    """Options."""

    output: Path = Path("outputs/against_splatfacto")
    """Folder of the comparisons."""
    results: Path = Path("docs/results/against_splatfacto.json")
    """JSON; read where nothing is compared."""
    pictures: Path = Path("docs/pictures/against_splatfacto")
    """Path of the plot and the pictures, without an ending."""
    page: Optional[Path] = None
    """Markdown page into which the tables are written, between <!-- against-splatfacto --> and its end."""
    summary_page: Optional[Path] = None
    """Markdown page for a summary with goals and differences, between <!-- what-it-brings --> and its end."""
    objects: Optional[Path] = None
    """Collection of objects; not compared on if absent."""
    captures: Optional[Path] = None
    """Folder that holds the captures; those that are missing are left out."""
    methods: tuple[str, ...] = (
        "efficient-lvsm-plus-tiny",
        "splatfacto-lvsm",
        "splatfacto-sparse",
        "copy-nearest",
        "mean-of-context",
    )
    """Methods to compare: the same option as that of `elvsm compare`."""
    runs: tuple[str, ...] = ()
    """As elvsm compare takes them: NAME=PATH, where it is not the weights of the package."""
    context_views: tuple[int, ...] = (2, 4, 8)
    """Numbers of context views."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width of all images."""
    num_objects: Optional[int] = None
    """Only so many of the objects, the first ones."""
    splat_iterations: int = 500
    """Optimisation steps."""
    beside: str = "unknown"
    """What else ran on the machine, for the record."""


def comparisons(args: Args) -> dict[str, CompareOptions]:
    """What is compared, by name."""
    wanted: dict[str, dict[str, Any]] = {}
    if args.objects is not None:
        test = SceneCollection.open(args.objects, dataparser_config(None)).split("test")
        scenes = tuple(entry.name for entry in test[::EVERY][: args.num_objects])
        wanted["objects"] = {"data": args.objects, "scenes": scenes, "num_videos": len(scenes)}
    for name, dataparser in CAPTURES.items():
        if args.captures is not None and (args.captures / name).exists():
            wanted[name] = {"data": args.captures / name, "dataparser": dataparser}
    common = {
        "methods": args.methods,
        "runs": args.runs,
        "context_views": args.context_views,
        "image_size": args.image_size,
        "splat_iterations": args.splat_iterations,
        "num_videos": 0,
        "video_frames": TURN_FRAMES,
        "video_context_views": turn_views(args),
        "video_image_size": (PANEL, PANEL),
        "beside": args.beside,
    }
    return {name: CompareOptions(output=args.output / name, **common | options) for name, options in wanted.items()}


def turn_views(args: Args) -> int:
    """The number of context views that the animation is of."""
    return TURN_CONTEXT_VIEWS if TURN_CONTEXT_VIEWS in args.context_views else max(args.context_views)


def kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON says of a comparison: averages, and for every scene its scores and what was rendered for it."""
    methods: dict[str, dict[str, Any]] = {}
    for method in result["methods"]:
        summaries = methods[method["name"]] = {}
        for count, found in method["summaries"].items():
            costs = {name: cost(found, name) for name in ("first_picture_seconds", "render_ms", "peak_bytes")}
            per_scene = {
                scene: {m: row[m] for m in SHOWN if m in row} for scene, row in found.get("scenes", {}).items()
            }
            summaries[count] = {
                **found.get("metrics", {}),
                **costs,
                "scenes": per_scene,
                "num_failed": found["num_failed"],
            }
    for record in result["records"]:
        rendered = record.get("facts", {}).get("fit", {}).get("rendered_views")
        if rendered is not None:
            scenes = methods[record["method"]][str(record["context_views"])]["scenes"]
            scenes[record["scene"]]["rendered_views"] = rendered
    about = ("machine", "code", "versions", "beside", "image_size", "context_views", "scenes")
    notes = {method["name"]: method["note"] for method in result["methods"]}
    return {**{name: result[name] for name in about}, "notes": notes, "methods": methods}


def with_other_rows(found: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison with the rows of an earlier one on the same views that have not been made anew.

    ``kept`` says of which code they are.
    """
    if any(found[name] != before.get(name) for name in ("image_size", "context_views", "scenes")):
        return dict(found)
    methods = {name: found["methods"].get(name, rows) for name, rows in before["methods"].items()} | found["methods"]
    older = [name for name in methods if name not in found["methods"]]
    return {
        **found,
        "notes": {name: found["notes"].get(name, before["notes"].get(name, "")) for name in methods},
        "kept": {name: before.get("kept", {}).get(name, before["code"]) for name in older},
        "methods": methods,
    }


def plot(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Metrics against the number of context views, a column for each comparison of the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = next(iter(results.values()))["methods"]
    shown = [metric for metric in SHOWN if any(metric in row for rows in methods.values() for row in rows.values())]
    baselines = {name.replace("_", "-") for name in BASELINES}
    colours = method_colours([{"name": name, "kind": "baseline" if name in baselines else "other"} for name in methods])
    size = (max(6.4, 3.2 * len(results)), 2.8 * len(shown))  # the legend needs so much
    figure, axes = plt.subplots(len(shown), len(results), figsize=size, dpi=110, layout="constrained", squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        for axis, metric in zip(axes[:, column], shown):
            for name_of_method, rows in result["methods"].items():
                points = sorted((int(count), row[metric]) for count, row in rows.items() if metric in row)
                colour = colours.get(name_of_method)
                axis.plot(*zip(*points), marker="o", color=colour, label=name_of_method)
            axis.set(xticks=result["context_views"], title=f"{name}: {METRICS[metric][0]}")
            axis.grid(alpha=0.25)
    axes[-1, 0].set_xlabel("context views")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    write_figure(path, figure)


def pictures(path: Path, args: Args, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each scene: its first target, then what the methods that pictures show make of it, from few to many
    views."""
    rows = []
    for name, result in results.items():
        layout = Layout((args.output / name).resolve())
        for scene in result["scenes"]:
            file = frame_file(scene["targets"][0])
            row = [layout.images(scene["name"], "target") / file]
            for count in result["context_views"]:
                row += [layout.pictures(spec, count, scene["name"], "target") / file for spec in pictured(result)]
            rows.append([read_picture(picture) for picture in row if picture.exists()])
    write_image(path, sheet(rows))


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__)
    try:
        results = {name: compare(options) for name, options in comparisons(args).items()}
    except ValueError as error:
        sys.exit(f"error: {error}")
    if results:
        before = json.loads(args.results.read_text()) if args.results.exists() else {}
        found = {name: with_other_rows(kept(result), before.get(name, {})) for name, result in results.items()}
        write_json(args.results, found)
        plot(args.pictures.with_suffix(".png"), found)
        pictures(args.pictures.with_name(f"{args.pictures.name}_scenes.png"), args, results)
    elif not args.results.exists():
        known = ", ".join(CAPTURES)
        sys.exit(f"error: nothing to compare on: expected --objects, --captures with one of {known}, or {args.results}")
    if "objects" in results:
        frames = turn(args.output / "objects", results["objects"], turn_views(args), TURN_FRAMES)
        write_animation(args.pictures.with_name(f"{args.pictures.name}_turning.webp"), frames)
    content = json.loads(args.results.read_text())
    try:
        if args.page is not None:
            write_part(args.page, "against-splatfacto", tables(content))
        if args.summary_page is not None:
            write_part(args.summary_page, "what-it-brings", summary(content))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(tables(content))


if __name__ == "__main__":
    main()
