"""Structure from motion by pycolmap: features, matches, cameras."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

from elvsm_nerfstudio.files import whole
from elvsm_nerfstudio.poses.photos import Photo

if TYPE_CHECKING:
    import pycolmap

CameraModel = Literal["SIMPLE_RADIAL", "OPENCV", "OPENCV_FISHEYE", "PINHOLE"]
Matching = Literal["auto", "exhaustive", "sequential"]

MAX_EXHAUSTIVE = 150
"""Photos up to which all pairs are matched where nobody says how."""
OVERLAP = 10
"""Sequential matching: neighbours on either side, and as many at distances that double."""
PAIRS_AT_A_TIME = 64
MAX_SIDE, MAX_FEATURES = 1600, 4096
"""Pixels of the longer side at which features are found, and how many of a photo."""
SEED = 0


def load_pycolmap():
    """The package pycolmap, saying nothing but errors that end the program.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise ValueError(
            f"finding cameras needs the package pycolmap ({error}); install it with "
            "`pip install 'elvsm-nerfstudio[poses]'`"
        ) from None
    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value
    return pycolmap


def pairs_to_match(names: Sequence[str], matching: Matching, from_video: bool) -> list[tuple[str, str]]:
    """Pairs of photos to look for common features in.

    ``auto`` takes all pairs of up to MAX_EXHAUSTIVE photos and of photos that are no video's frames.
    """
    if matching == "exhaustive" or (matching == "auto" and not (from_video and len(names) > MAX_EXHAUSTIVE)):
        return list(combinations(names, 2))
    steps = {*range(1, OVERLAP + 1), *(2**power for power in range(OVERLAP + 1))}
    return [(names[i], names[i + step]) for i in range(len(names)) for step in sorted(steps) if i + step < len(names)]


class Mapping:
    """COLMAP's database and models of one capture, in a folder; what is in the database is not computed again.

    Args:
        images: folder of the photos.
        folder: for the database and the models.
    """

    def __init__(self, images: Path, folder: Path, camera_model: CameraModel):
        self.colmap = load_pycolmap()
        self.images, self.folder, self.camera_model = images, folder, camera_model
        self.database = folder / "database.db"
        folder.mkdir(parents=True, exist_ok=True)
        self.colmap.set_random_seed(SEED)

    def extract(self, photos: Sequence[Photo], advance: Callable[[int], None]) -> None:
        """Finds the features of photos; those of one camera share its parameters, which begin at EXIF's focal length.

        Args:
            advance: told how many photos have been done.
        """
        colmap = self.colmap
        options = colmap.FeatureExtractionOptions(use_gpu=False, max_image_size=MAX_SIDE)
        options.sift.max_num_features = MAX_FEATURES
        at_a_time = os.cpu_count() or 1
        for camera in dict.fromkeys(photo.camera for photo in photos):
            names = [photo.name for photo in photos if photo.camera == camera]
            # The first photo alone makes the camera that the others share.
            parts = [names[:1], *(names[i : i + at_a_time] for i in range(1, len(names), at_a_time))]
            for part in parts:
                reader = colmap.ImageReaderOptions(camera_model=self.camera_model)
                if part is not parts[0]:
                    reader.existing_camera_id = self._camera_of(names[0])
                colmap.extract_features(
                    self.database,
                    self.images,
                    image_names=part,
                    camera_mode=colmap.CameraMode.SINGLE,
                    reader_options=reader,
                    extraction_options=options,
                    device=colmap.Device.cpu,
                )
                advance(len(part))

    def match(self, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None]) -> None:
        """Finds common features of pairs of photos, checked by their geometry.

        Args:
            advance: told how many pairs have been done.
        """
        colmap = self.colmap
        file = self.folder / "pairs.txt"
        geometry = colmap.TwoViewGeometryOptions()
        geometry.ransac.random_seed = SEED
        for first in range(0, len(pairs), PAIRS_AT_A_TIME):
            part = pairs[first : first + PAIRS_AT_A_TIME]
            file.write_text("".join(f"{one} {other}\n" for one, other in part), "utf8")
            colmap.match_image_pairs(
                self.database,
                colmap.FeatureMatchingOptions(use_gpu=False),
                colmap.ImportedPairingOptions(match_list_path=file),
                geometry,
                device=colmap.Device.cpu,
            )
            advance(len(part))
        file.unlink(missing_ok=True)

    def reconstruct(self, registered: Callable[[int], None]) -> Optional[pycolmap.Reconstruction]:
        """The largest model of photos that fit together, also in ``sparse/0``; None where not even two do.

        Where none begins with COLMAP's own thresholds, it is tried with lower ones.

        Args:
            registered: told how many photos the model that is being built has.
        """
        colmap = self.colmap
        count = 0

        def begin() -> None:
            nonlocal count
            count = 2
            registered(count)

        def more() -> None:
            nonlocal count
            count += 1
            registered(count)

        for lowered in (False, True):
            options = colmap.IncrementalPipelineOptions(random_seed=SEED, min_model_size=2)
            if lowered:
                options.mapper.init_min_num_inliers, options.mapper.init_min_tri_angle = 40, 6.0
                options.mapper.abs_pose_min_num_inliers = 15
            tries = self.folder / "tries"
            shutil.rmtree(tries, ignore_errors=True)
            tries.mkdir()
            models = colmap.incremental_mapping(
                self.database, self.images, tries, options,
                initial_image_pair_callback=begin, next_image_callback=more,
            )  # fmt: skip
            shutil.rmtree(tries)
            largest = max(models.values(), key=lambda model: model.num_reg_images(), default=None)
            if largest is not None and largest.num_reg_images() > 2:
                break
        if largest is not None:
            write_model(largest, self.folder / "sparse" / "0")
            registered(largest.num_reg_images())
        return largest

    def _camera_of(self, name: str) -> int:
        with self.colmap.Database.open(self.database) as database:
            return database.read_image_with_name(name).camera_id


def write_model(model: pycolmap.Reconstruction, folder: Path) -> None:
    """Writes COLMAP's binary files of a model, all of them or none."""
    shutil.rmtree(folder, ignore_errors=True)
    with whole(folder) as partial:
        partial.mkdir()
        model.write_binary(partial)
