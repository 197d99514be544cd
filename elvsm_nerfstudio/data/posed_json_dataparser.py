"""LVSM's layout: a JSON of posed frames a scene, and text files that list those, for any nerfstudio method."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs

from elvsm_nerfstudio.data.images import DataError, open_image
from elvsm_nerfstudio.data.posed_frames import PosedFramesDataParserConfig, dataparser_outputs

LIST_NAME = "full_list.txt"
"""A split's list of scenes, as the official preprocessing names it."""


@dataclass
class PosedJsonDataParserConfig(PosedFramesDataParserConfig):
    """One scene: ``{"scene_name", "frames": [{"image_path", "fxfycxcy" (pixels), "w2c" (4x4, OpenCV)}, ...]}``."""

    _target: type = field(default_factory=lambda: PosedJson)
    """target class to instantiate"""
    data: Path = Path()
    """The scene's JSON. Image paths are relative to its folder or, as the official preprocessing writes them, to where
    it was started: the working folder, or one above the JSON."""


class PosedJson(DataParser):
    """Frames in the order of the file. All images are of the size of the first, or of ``w`` and ``h`` of the frame."""

    config: PosedJsonDataParserConfig

    def _generate_dataparser_outputs(self, split: str = "train") -> DataparserOutputs:
        path = self.config.data
        frames = self._read(path)
        folders = (path.parent, Path(), *path.parents)
        base = next((folder for folder in folders if (folder / frames[0]["image_path"]).is_file()), path.parent)
        names = [base / frame["image_path"] for frame in frames]
        if not all("w" in frame and "h" in frame for frame in frames):
            with open_image(names[0]) as image:
                width, height = image.size
            frames = [{"w": width, "h": height, **frame} for frame in frames]
        return dataparser_outputs(
            self.config,
            split,
            names,
            torch.tensor([frame["w2c"] for frame in frames], dtype=torch.float64),
            torch.tensor([frame["fxfycxcy"] for frame in frames], dtype=torch.float64),
            torch.tensor([[frame["h"], frame["w"]] for frame in frames]),
        )

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        try:
            frames = json.loads(path.read_text("utf8"))["frames"]
            fits = all(
                isinstance(frame["image_path"], str)
                and torch.tensor(frame["fxfycxcy"]).shape == (4,)
                and torch.tensor(frame["w2c"]).shape == (4, 4)
                for frame in frames
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a scene of posed frames ({type(error).__name__}: {error})") from error
        if not fits or not frames:
            raise DataError(f'{path}: expected frames with "image_path", four "fxfycxcy" and a 4x4 "w2c"')
        return frames


def read_list(path: Path) -> list[Path]:
    """The scene JSONs that a list names, one a line, relative to the list.

    Raises:
        DataError: for a list that cannot be read or is empty.
    """
    try:
        lines = path.read_text("utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    scenes = [path.parent / line.strip() for line in lines if line.strip()]
    if not scenes:
        raise DataError(f"{path} lists no scenes; expected the path of a scene's JSON on each line")
    return scenes
