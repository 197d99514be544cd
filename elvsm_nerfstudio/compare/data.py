"""What `elvsm compare` compares on: scenes, frames and photos, written once and checked ever after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from elvsm_nerfstudio.compare.layout import Layout, Settings
from elvsm_nerfstudio.compare.options import CompareOptions
from elvsm_nerfstudio.compare.scoring import frame_file
from elvsm_nerfstudio.compare.split import Split, choose_split, read_split, write_split
from elvsm_nerfstudio.data.datamanager import EvaluationScene
from elvsm_nerfstudio.data.evaluation_views import ViewRule
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.report import write_image, write_json
from elvsm_nerfstudio.evaluation.results import Fingerprint


def find_scenes(args: CompareOptions, collection: SceneCollection) -> list[Scene]:
    """The compared scenes of the test split.

    Raises:
        ValueError: naming those that are not there.
    """
    entries = collection.split("test")
    names = [entry.name for entry in entries]
    unknown = [name for name in args.scenes if name not in names]
    if unknown or not entries:
        raise ValueError(
            f"--scenes {' '.join(unknown)}: {args.data} has no such scene in its test split; it has "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    wanted = args.scenes or names
    return [collection.load(entry) for entry in entries if entry.name in wanted][: args.num_scenes]


def keep_settings(layout: Layout, settings: Settings) -> None:
    """Writes what is compared on, or checks that it is what has been compared on here before."""
    path = layout.root / "comparison.json"
    now = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in now.items():
            if before["settings"][name] != value:
                raise ValueError(
                    f"--output {layout.root} holds a comparison with {name} {before['settings'][name]}; expected the "
                    f"same, found {value}. Choose another --output"
                )
    else:
        write_json(path, {"settings": now})


def keep_split(args: CompareOptions, layout: Layout, scenes: Sequence[Scene]) -> Split:
    """The comparison's split: the one that is there, else the one given, else chosen now."""
    most = max(args.context_views)
    given = None if args.split is None else read_split(args.split, scenes, most)
    if layout.split.exists():
        split = read_split(layout.split, scenes, most)
        if given not in (None, split):
            raise ValueError(f"--split {args.split}: found other frames than in {layout.split}, which is never "
                             "changed; choose another --output")  # fmt: skip
    else:
        split = choose_split(scenes, most, args.num_target_views) if given is None else given
    if not layout.split.exists():
        write_split(layout.split, split, max(len(choice.context) for choice in split.values()))
    for count in args.context_views:
        write_split(layout.index(count), split, count)
    return split


def keep_images(args: CompareOptions, layout: Layout, settings: Settings, split: Split) -> list[dict[str, Any]]:
    """Writes each scene's photos as the methods get them, and checks that they are those of earlier calls."""
    path, most = layout.root / "comparison.json", max(args.context_views)
    content = json.loads(path.read_text())
    known = content.setdefault("fingerprints", {})
    datamanager = settings.datamanager(layout.split, most, "cpu")
    listed = []
    for entry in datamanager.eval_entries:
        choice = split[entry.name]
        scene = datamanager.evaluation_scene(entry, ViewRule(len(choice.context), source="index"))
        fingerprint = Fingerprint()
        fingerprint.add(scene.name, (*scene.context_names, *scene.target_names), scene.views)
        if known.setdefault(entry.name, fingerprint.hexdigest()) != fingerprint.hexdigest():
            raise ValueError(f"--data {args.data}: images or cameras of {entry.name} have changed since "
                             f"{layout.root} was begun; choose another --output")  # fmt: skip
        _write_photos(layout, scene, choice.context, choice.target)
        frames = {"context": list(choice.context), "targets": list(choice.target)}
        names = {"context_names": list(scene.context_names), "target_names": list(scene.target_names)}
        listed.append({"name": entry.name, **frames, **names})
    write_json(path, content)
    return listed


def _write_photos(layout: Layout, scene: EvaluationScene, context: Sequence[int], target: Sequence[int]) -> None:
    for kind, frames, views in (("context", context, scene.views.context), ("target", target, scene.views.target)):
        for frame, rgb in zip(frames, views.rgb[0]):
            file = layout.images(scene.name, kind) / frame_file(frame)
            if not file.exists():
                write_image(file, rgb)
