"""A scene through a nerfstudio dataparser: all its frames, and which of them are in which split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from elvsm_nerfstudio.data.chunks import SPLITS
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.names import natural_order
from elvsm_nerfstudio.data.posed_frames import PosedFramesDataParserConfig

COLMAP_FOLDERS = ("colmap/sparse/0", "sparse/0", "colmap/sparse", "sparse")
"""Where a COLMAP reconstruction is looked for, unless --colmap-path names one that is there."""

_NAMES: dict[type[DataParserConfig], str] = {
    NerfstudioDataParserConfig: "nerfstudio-data",
    BlenderDataParserConfig: "blender-data",
    ColmapDataParserConfig: "colmap",
}
"""What ns-train calls them."""


def suitable_dataparser(path: Path) -> Optional[DataParserConfig]:
    """The dataparser whose files a folder holds: nerfstudio's for transforms.json, Blender's for transforms_train.json
    (as of nerf_synthetic), COLMAP's for a model in one of ``COLMAP_FOLDERS``; None for other files."""
    if (path / "transforms.json").is_file():
        return NerfstudioDataParserConfig()
    if (path / "transforms_train.json").is_file():
        return BlenderDataParserConfig()
    folder = _colmap_folder(path, COLMAP_FOLDERS)
    return None if folder is None else ColmapDataParserConfig(colmap_path=Path(folder))


def other_dataparser(config: DataParserConfig, path: Path) -> str:
    """What to add to a dataparser's refusal of a scene: which other one its files are for, if any."""
    suitable = suitable_dataparser(path)
    if suitable is None or type(config) is type(suitable) or type(config) not in _NAMES:
        return ""
    name = _NAMES[type(suitable)]
    return (
        f"; its files are those of the dataparser {name}, where {_NAMES[type(config)]} was asked for: end the command "
        f"with {name} (elvsm compare: --dataparser {name})"
    )


def _colmap_folder(path: Path, folders: Sequence[str | Path]) -> Optional[str | Path]:
    kinds = ("cameras.txt", "cameras.bin")
    return next((folder for folder in folders if any((path / folder / kind).is_file() for kind in kinds)), None)


def refusal(config: DataParserConfig, path: Path) -> Optional[str]:
    """Why a dataparser cannot read a folder as one scene; None if it can."""
    try:
        _parser_config(config, path).setup().get_dataparser_outputs("train")
    except Exception as error:  # dataparsers raise anything from KeyError to AssertionError
        return reason(error)
    return None


def reason(error: Exception) -> str:
    if "K4/K5/K6" in str(error):
        return (
            "its COLMAP camera model has a fourth radial coefficient, which nerfstudio's colmap dataparser refuses; "
            "convert it with `ns-process-data images --skip-colmap`, whose transforms.json may have one"
        )
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _parser_config(config: DataParserConfig, path: Path, **options) -> DataParserConfig:
    """A dataparser's config for a scene, without what nothing here looks at.

    Args:
        options: where the dataparser has them.
    """
    wanted = {"extract_images": False, "load_3D_points": False, **options}
    if getattr(config, "downscale_factor", 1) is None:
        wanted["downscale_factor"] = 1  # downscaled copies are found when images are read
    if isinstance(config, ColmapDataParserConfig):
        wanted["colmap_path"] = Path(_colmap_folder(path, (config.colmap_path, *COLMAP_FOLDERS)) or config.colmap_path)
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, data=path, **{k: v for k, v in wanted.items() if k in known})


def by_split(config: DataParserConfig, path: Path) -> dict[str, DataparserOutputs]:
    """A scene's frames by split, of those splits that it has; train is always among them."""
    parser = _parser_config(config, path).setup()
    outputs = {"train": parser.get_dataparser_outputs("train")}
    for split in ("test",) if splits_evenly(config, path) else ("test", "val"):
        try:
            outputs[split] = parser.get_dataparser_outputs(split)
        except RuntimeError as error:  # a transforms.json that lists files of other splits
            if "is missing" not in str(error):
                raise
        except FileNotFoundError as error:  # a split that is a file of its own
            if error.filename is None or split not in Path(error.filename).stem:
                raise
    if len(outputs) == 1:
        raise DataError("it has a train split but neither val nor test")
    return outputs


def all_frames(config: DataParserConfig, path: Path) -> DataparserOutputs:
    """All frames of a scene, of whatever split."""
    if isinstance(config, PosedFramesDataParserConfig):
        return _parser_config(config, path, eval_mode="all").setup().get_dataparser_outputs()
    if splits_evenly(config, path):
        options = {"eval_mode": "fraction", "train_split_fraction": 1.0}
        return _by_name([_parser_config(config, path, **options).setup().get_dataparser_outputs()])
    return _by_name(list(by_split(config, path).values()))


def splits_evenly(config: DataParserConfig, path: Path) -> bool:
    """Whether a dataparser holds frames out by their number, the same for val and test: where it can, unless the scene
    says itself which frames are in which split, in its transforms.json or beside a COLMAP model."""
    if isinstance(config, PosedFramesDataParserConfig):
        return True
    file = path / "transforms.json" if path.is_dir() else path
    listed = file.suffix == ".json" and file.is_file() and b'_filenames"' in file.read_bytes()
    listed |= any((path / f"{split}_list.txt").exists() for split in SPLITS)
    return hasattr(config, "train_split_fraction") and not listed


def identities(outputs: DataparserOutputs) -> list[tuple[Path, bytes]]:
    """What tells the frames of a scene apart: the image file and the camera, as one image may have several."""
    cameras = outputs.cameras
    poses = cameras.camera_to_worlds.flatten(1)
    numbers = torch.cat([poses, cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=1).numpy()
    return [(file, camera.tobytes()) for file, camera in zip(outputs.image_filenames, numbers)]


def _by_name(parts: Sequence[DataparserOutputs]) -> DataparserOutputs:
    """Each frame of some splits once, in order of file names: COLMAP numbers images as its threads come to them."""
    frames = [frame for part in parts for frame in identities(part)]
    first = {frame: i for i, frame in reversed(list(enumerate(frames)))}
    files = [file for file, _ in frames]
    index = sorted(first.values(), key=lambda i: (natural_order(files[i]), i))
    masks = [mask for part in parts for mask in part.mask_filenames or ()]
    return dataclasses.replace(
        parts[0],
        image_filenames=[files[i] for i in index],
        cameras=_concatenate([part.cameras for part in parts])[torch.tensor(index, dtype=torch.long)],
        mask_filenames=[masks[i] for i in index] if len(masks) == len(files) else None,
    )


def _concatenate(parts: Sequence[Cameras]) -> Cameras:
    def column(name: str):
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type")
    return Cameras(**{name: column(name) for name in names})
