"""How much of its quality a network keeps through other lenses than the one that a collection was rendered with.

Every case is compared with the render through the collection's own lens on the same pixels: those that both show, at
the coarser scale of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from rich.progress import track
from torch import Tensor

from elvsm_nerfstudio.data.evaluation_views import ViewRule, choose_evaluation_views
from elvsm_nerfstudio.data.images import ImageSpec
from elvsm_nerfstudio.data.lenses import Lens
from elvsm_nerfstudio.data.samples import Sample, read_sample
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.network import SceneNetwork
from elvsm_nerfstudio.views import ViewSet

Images = Float[Tensor, "view height width 3"]

CONTEXT_VIEWS = TARGET_VIEWS = 4
SHIFTS = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""Offsets of principal points, in shares of a picture's width."""
AS_TAKEN = Lens(1.0, (0.0, 0.0))


@dataclass(frozen=True)
class Case:
    """Lenses of the context views, by turns, and of the targets."""

    name: str
    context: tuple[Lens, ...] = (AS_TAKEN,)
    target: Lens = AS_TAKEN


def shifted(pixels: int, size: int) -> Lens:
    """A lens whose picture is cut that many pixels of ``size`` further to the right."""
    return Lens(1.0, (pixels / size, 0.0))


def cases(size: int) -> list[Case]:
    """All cases for pictures of ``size`` pixels."""
    wide, narrow = Lens(0.75, (0.0, 0.0)), Lens(4 / 3, (0.0, 0.0))
    shifts = [round(size * share) for share in SHIFTS]
    return [
        *(Case(f"targets, principal point {n} px off", target=shifted(n, size)) for n in shifts),
        *(Case(f"context, principal point {n} px off", context=(shifted(n, size),)) for n in shifts),
        Case("targets, zoom 0.75", target=wide),
        Case("targets, zoom 1.33", target=narrow),
        Case("all views, zoom 0.75", context=(wide,), target=wide),
        Case("all views, zoom 1.33", context=(narrow,), target=narrow),
        Case("context of mixed zoom, 0.75 to 1.33", context=(wide, AS_TAKEN, narrow, AS_TAKEN)),
    ]


def lens_scores(network: SceneNetwork, data: Path, size: int) -> list[dict[str, float | str]]:
    """Scores of a network on the test split of a collection through each case's lenses.

    Args:
        data: a collection whose pictures are larger than ``size`` pixels.

    Returns:
        For each case its name, PSNR, and the PSNR through the collection's own lens on the same pixels, means over the
        targets of all scenes; the first row is that lens itself.
    """
    collection = SceneCollection.open(data, NerfstudioDataParserConfig())
    rows: dict[str, list[tuple[float, float]]] = {}
    for entry in track(collection.split("test"), description="Lenses"):
        scene = collection.load(entry)
        middle, middle_truth = _render(network, scene, Case("as taken"), size)
        own = [float(psnr(*pair)) for pair in zip(middle, middle_truth)]
        rows.setdefault("as taken", []).extend(zip(own, own))
        for case in cases(size):
            shown = _render(network, scene, case, size)
            images = (*shown, middle, middle_truth)
            found, truth, reference, reference_truth = (
                _common(image, case.target, is_reference=position > 1) for position, image in enumerate(images)
            )
            pairs = zip(found, truth, reference, reference_truth)
            rows.setdefault(case.name, []).extend((float(psnr(a, b)), float(psnr(c, d))) for a, b, c, d in pairs)
    means = {name: torch.tensor(scores, dtype=torch.float64).mean(dim=0).tolist() for name, scores in rows.items()}
    return [{"case": name, "psnr": found, "psnr_as_taken": reference} for name, (found, reference) in means.items()]


@torch.inference_mode()
def _render(network: SceneNetwork, scene: Scene, case: Case, size: int) -> tuple[Images, Images]:
    """Renders of a scene's targets, and the pictures themselves, seen through a case's lenses."""
    choice = choose_evaluation_views(scene, None, ViewRule(CONTEXT_VIEWS, TARGET_VIEWS))
    lenses = [case.context[i % len(case.context)] for i in range(len(choice.context))]
    lenses += [case.target] * len(choice.target)
    sample = read_sample(scene, choice, ImageSpec((size, size)), lenses=lenses)
    views: ViewSet = Sample.collate([sample]).view_set("cpu")
    frame = CanonicalFrame.estimate(views.context.camera_to_world)
    return network(views.context, views.target, frame)[0], views.target.rgb[0]


def _common(images: Images, lens: Lens, is_reference: bool) -> Images:
    """The pixels that a target through a lens and one through the collection's own have in common.

    Args:
        is_reference: whether these images are those through the collection's own lens.
    """
    size = images.shape[1]
    pixels = round(lens.shift[0] * size)
    if pixels:
        return images[:, :, pixels:] if is_reference else images[:, :, : size - pixels]
    # Of the finer and narrower one all is common, of the other the middle.
    is_finer = is_reference == (lens.zoom < 1)
    side = round(size * min(lens.zoom, 1 / lens.zoom))
    if not is_finer:
        start = (size - side) // 2
        return images[:, start : start + side, start : start + side]
    resized = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2), size=(side, side), mode="bilinear", antialias=True
    )
    return resized.permute(0, 2, 3, 1)


def patch_border_ratio(images: Images, patch_size: int) -> float:
    """Mean absolute difference of neighbouring pixels across patch borders over that inside patches.

    1 where patches do not show.
    """
    across, inside = [], []
    for axis in (1, 2):
        difference = images.diff(dim=axis).abs()
        borders = torch.arange(difference.shape[axis]) % patch_size == patch_size - 1
        across.append(difference.movedim(axis, 0)[borders].flatten())
        inside.append(difference.movedim(axis, 0)[~borders].flatten())
    return float(torch.cat(across).mean() / torch.cat(inside).mean())


def lens_table(rows: Sequence[Mapping[str, float | str]]) -> str:
    """The rows of ``lens_scores`` as a table."""
    lines = ["| lens | PSNR | as taken, same pixels | difference |", "|---|---|---|---|"]
    for row in rows:
        found, reference = float(row["psnr"]), float(row["psnr_as_taken"])
        lines.append(f"| {row['case']} | {found:.2f} | {reference:.2f} | {found - reference:+.2f} |")
    return "\n".join(lines)
