"""Makes a multi-view data set of objects: 820 pieces of furniture, each rendered from many known cameras.

The models come from Debian's package `sweethome3d-furniture` (CC0 and CC-BY 3.0; `scenes.json` names licence and
creator of each). Every object becomes one nerfstudio scene, `<output>/<name>/transforms.json` and `images/*.png`;
`scenes.json` lists the scenes with their split, `evaluation_index.json` says which views of a test scene are given and
which are to be predicted, and `contact_sheet.png` shows a part of it all.

    elvsm data objects --output data/objects --resolution 128 --views-per-object 24

A run that was stopped, by whatever means, goes on where it was when the same command is given again.
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.synthetic.objects import ObjectOptions, make_object_scenes


def main(args: list[str]) -> None:
    """Command line."""
    make_object_scenes(parse(ObjectOptions, "data objects", __doc__, args))
