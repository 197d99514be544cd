"""Makes a set of walks through furnished rooms, a stand-in for RealEstate10K that can be made anywhere.

Each room is one scene: 60 to 100 frames of a slow walk at eye height, as `<output>/<room>/transforms.json` and
`images/*.png` with `scenes.json` and `evaluation_index.json` beside them; with --chunks also as RealEstate10K chunks.
Train, val and test differ in their rooms and in the furniture that stands in them. Furniture is Debian's package
`sweethome3d-furniture` at its catalogue size; `scenes.json` credits every piece. Needs OpenGL, but no GPU.

    elvsm data rooms --output data/rooms --resolution 144 256 --chunks data/rooms_re10k

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.synthetic.rooms import RoomOptions, make_room_scenes


def main(args: list[str]) -> None:
    """Command line."""
    make_room_scenes(parse(RoomOptions, "data rooms", __doc__, args))
