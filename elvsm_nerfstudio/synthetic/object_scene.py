"""One scene: an object's cameras, pictures and `transforms.json`."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from elvsm_nerfstudio.files import whole
from elvsm_nerfstudio.synthetic.furniture import CatalogueObject
from elvsm_nerfstudio.synthetic.object_mesh import ObjectMesh, load_object
from elvsm_nerfstudio.synthetic.object_renderer import Renderer

SCENE_FORMAT = "elvsm-objects/1"
"""Goes up when the pictures or poses of a scene change for the same settings."""

FIELD_OF_VIEW_DEGREES = 50.0
ELEVATION_RANGE_DEGREES = (-10.0, 60.0)
FRAME_MARGIN = 0.05
"""Share of the half picture that stays free on each side."""
MIN_DISTANCE = 1.5
"""In radii of the bounding sphere: a rod seen along its axis would otherwise pull the camera right up to it."""

NUM_CONTEXT_VIEWS = 4
NUM_TARGET_VIEWS = 4
PNG_COMPRESSION = 1


@dataclass(frozen=True)
class Settings:
    """What the pictures and poses of a scene depend on, besides the object."""

    resolution: int
    views_per_object: int
    seed: int
    renderer: str

    def as_json(self) -> dict:
        """As it stands in transforms.json under "made_with"."""
        return {"format": SCENE_FORMAT, **vars(self)}


def random_generator(seed: int, name: str, purpose: str) -> np.random.Generator:
    """Random numbers that depend on these three and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def view_directions(seed: int, name: str, num_views: int) -> np.ndarray:
    """[views, 3] unit vectors from the object to its cameras: azimuth and elevation are uniform in their ranges."""
    uniform = random_generator(seed, name, "cameras").uniform(size=(num_views, 2))
    low, high = np.radians(ELEVATION_RANGE_DEGREES)
    azimuth, elevation = 2 * np.pi * uniform[:, 0], low + (high - low) * uniform[:, 1]
    return np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=-1
    )


def focal_length(resolution: int) -> float:
    """The focal length in pixels of a picture with FIELD_OF_VIEW_DEGREES."""
    return resolution / 2 / math.tan(math.radians(FIELD_OF_VIEW_DEGREES / 2))


def fitted_poses(mesh: ObjectMesh, directions: np.ndarray) -> np.ndarray:
    """Cameras that look at the origin, as near as they can be without cropping the object.

    Args:
        mesh: the object, its bounding box centred on the origin.
        directions: [views, 3] unit vectors from the origin to the cameras.

    Returns:
        [views, 4, 4] camera-to-world, OpenGL axes (+X right, +Y up, -Z forward), world +Z up.
    """
    points = mesh.positions.reshape(-1, 3)
    half_extent = math.tan(math.radians(FIELD_OF_VIEW_DEGREES / 2)) * (1 - FRAME_MARGIN)
    nearest = MIN_DISTANCE * float(np.linalg.norm(points, axis=-1).max())
    poses = np.tile(np.eye(4), (len(directions), 1, 1))
    for pose, backward in zip(poses, directions, strict=True):
        right = np.cross([0.0, 0.0, 1.0], backward)
        right /= np.linalg.norm(right)
        pose[:3, :3] = np.stack([right, np.cross(backward, right), backward], axis=-1)
        in_camera = points @ pose[:3, :3].astype(np.float32)
        # A point is inside the frame if |x| and |y| are at most half_extent * (distance - z).
        fits = np.abs(in_camera[:, :2]).max(axis=-1) / half_extent + in_camera[:, 2]
        pose[:3, 3] = max(float(fits.max()), nearest) * backward
    return poses


def evaluation_views(directions: np.ndarray, generator: np.random.Generator) -> dict[str, list[int]]:
    """Context views far apart from each other, beginning with view 0, and random target views among the others.

    Args:
        directions: [views, 3] unit vectors from the object to its cameras.
        generator: chooses the target views.

    Returns:
        {"context": frame numbers, "target": frame numbers}, disjoint.
    """
    # Not data.view_samplers.farthest_point_views: it begins with another view, which would change the published index.
    context = [0]
    while len(context) < NUM_CONTEXT_VIEWS:
        closeness = (directions @ directions[context].T).max(axis=1)
        closeness[context] = np.inf
        context.append(int(closeness.argmin()))
    others = np.setdiff1d(np.arange(len(directions)), context)
    target = np.sort(generator.choice(others, size=NUM_TARGET_VIEWS, replace=False))
    return {"context": context, "target": target.tolist()}


def image_name(index: int) -> str:
    """File name of a picture, relative to the scene's folder."""
    return f"images/{index:03d}.png"


def write_scene(item: CatalogueObject, output: Path, settings: Settings, renderer: Renderer) -> None:
    """Renders one object into `<output>/<name>`, a folder which appears when the scene is complete."""
    mesh = load_object(item.model, np.reshape(item.rotation, (3, 3)))
    poses = fitted_poses(mesh, view_directions(settings.seed, item.name, settings.views_per_object))
    focal = focal_length(settings.resolution)
    pictures = renderer.render(mesh, poses, focal)
    if not pictures[..., 3].any():
        raise ValueError(f"nothing can be seen of {item.model.name}")

    with whole(output / item.name) as partial:
        (partial / "images").mkdir(parents=True)
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(partial / image_name(index), compress_level=PNG_COMPRESSION)
        write_json(partial / "transforms.json", scene_json(item, settings, focal, poses))


def scene_json(item: CatalogueObject, settings: Settings, focal: float, poses: np.ndarray) -> dict:
    """The content of a scene's transforms.json, in nerfstudio's format."""
    side = settings.resolution
    return {
        "camera_model": "OPENCV",
        "w": side,
        "h": side,
        "fl_x": focal,
        "fl_y": focal,
        "cx": side / 2,
        "cy": side / 2,
        "made_with": settings.as_json(),
        "object": item.as_json(),
        "frames": [
            {"file_path": image_name(index), "transform_matrix": pose.tolist()} for index, pose in enumerate(poses)
        ],
    }


# Not evaluation.report.write_json: importing it brings torch, 1.7 s more for the command and for each process.
def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file that is either the old one or the new one, whatever happens."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
