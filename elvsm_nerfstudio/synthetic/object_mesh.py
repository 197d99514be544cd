"""Textured OBJ models as triangles in world coordinates."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

MIN_OPACITY = 0.125
"""A surface covers no sample of a picture unless its opacity is above this number."""

DEFAULT_COLOR = (0.7, 0.7, 0.7)
MAX_TEXTURE_SIDE = 1024  # larger ones only alias: the pictures are small and the renderer's mipmaps are few
CREASE_DEGREES = 40.0
MAX_CORNER_PAIRS = 20_000_000  # bounds the memory of corner_normals to about 1 GB

Y_UP_TO_Z_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


@dataclass
class Surface:
    """A run of triangles with one material."""

    first_face: int
    num_faces: int
    color: tuple[float, float, float]
    """Albedo in [0, 1]; unused where there is a texture."""
    opacity: float
    texture: np.ndarray | None
    """[height, width, 4] uint8 RGBA, first row at the top (v = 1), or None."""
    emission: float = 0.0
    """Share of the colour that is there without any light; only rooms have such surfaces."""
    max_mipmap_level: int = 2
    """Coarser levels of a texture are not used: they would mix neighbouring patches of an atlas."""


@dataclass
class ObjectMesh:
    """Triangles of one object, in world coordinates (+Z up). Corners are not shared between triangles."""

    positions: np.ndarray
    """[faces, 3 corners, 3] float32."""
    normals: np.ndarray
    """[faces, 3 corners, 3] float32, unit length."""
    uvs: np.ndarray
    """[faces, 3 corners, 2] float32, v up."""
    surfaces: list[Surface]


def load_object(path: Path, rotation: np.ndarray) -> ObjectMesh:
    """Loads an OBJ model with its materials and brings it to unit size.

    Args:
        path: the OBJ file; its coordinates are +Y up.
        rotation: [3, 3], applied to the file's coordinates first.

    Returns:
        The object with its bounding box centred on the origin, longest side 1, +Z up.

    Raises:
        ValueError: nothing in the file can be seen.
    """
    # trimesh reports every material it cannot read; those get the default colour and need no word.
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)
    scene = trimesh.load(path, process=False, force="scene")
    parts = [part for part in scene.geometry.values() if isinstance(part, trimesh.Trimesh) and len(part.faces) > 0]
    if not parts:
        raise ValueError(f"{path.name} holds no triangles")

    positions, normals, uvs, surfaces = [], [], [], []
    first_face = 0
    textures: dict[int, np.ndarray] = {}
    for part in parts:
        surface = _read_surface(part, first_face, textures)
        if surface.opacity <= MIN_OPACITY:
            continue  # it would only make the camera step back
        surfaces.append(surface)
        first_face += len(part.faces)
        positions.append(np.asarray(part.vertices, dtype=np.float64)[part.faces])
        normals.append(_file_normals(part))
        uvs.append(_file_uvs(part))
    if not surfaces:
        raise ValueError(f"every material of {path.name} is fully transparent")

    transform = Y_UP_TO_Z_UP @ rotation
    corners = _to_unit_size(np.concatenate(positions) @ transform.T, path.name)
    corner_normals = _complete_normals(np.concatenate(normals) @ transform.T, corners)
    return ObjectMesh(
        positions=corners.astype(np.float32),
        normals=corner_normals.astype(np.float32),
        uvs=np.concatenate(uvs).astype(np.float32),
        surfaces=surfaces,
    )


def _to_unit_size(corners: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(corners).all():
        raise ValueError(f"{name} holds vertices that are not finite numbers")
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    if not (high - low).max() > 0:
        raise ValueError(f"all vertices of {name} are the same point")
    return (corners - (low + high) / 2) / (high - low).max()


def _read_surface(part: trimesh.Trimesh, first_face: int, textures: dict[int, np.ndarray]) -> Surface:
    material = getattr(part.visual, "material", None)
    properties = getattr(material, "kwargs", {})
    image = getattr(material, "image", None)
    texture = None
    if image is not None and getattr(part.visual, "uv", None) is not None:
        if id(image) not in textures:
            textures[id(image)] = _read_texture(image)
        texture = textures[id(image)]
    return Surface(
        first_face=first_face,
        num_faces=len(part.faces),
        color=_read_color(properties.get("kd")),
        opacity=_read_opacity(properties.get("d")),
        texture=texture,
    )


def _read_color(diffuse: object) -> tuple[float, float, float]:
    if not isinstance(diffuse, list) or len(diffuse) != 3:
        return DEFAULT_COLOR
    red, green, blue = np.clip(diffuse, 0.0, 1.0)
    return float(red), float(green), float(blue)


def _read_opacity(dissolve: object) -> float:
    try:
        return float(np.clip(float(dissolve[-1]), 0.0, 1.0))  # "d 0.5" or "d -halo 0.5"
    except (TypeError, ValueError, IndexError):
        return 1.0


def _read_texture(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    longest = max(image.size)
    if longest > MAX_TEXTURE_SIDE:
        width, height = (max(1, round(side * MAX_TEXTURE_SIDE / longest)) for side in image.size)
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    return np.asarray(image)


def _file_normals(part: trimesh.Trimesh) -> np.ndarray:
    # Asking the part for its normals would make up smooth ones where the file has none.
    normals = part._cache["vertex_normals"] if "vertex_normals" in part._cache else np.zeros((len(part.vertices), 3))
    return np.asarray(normals, dtype=np.float64)[part.faces]


def _file_uvs(part: trimesh.Trimesh) -> np.ndarray:
    uv = getattr(part.visual, "uv", None)
    if uv is None:
        return np.zeros((len(part.faces), 3, 2))
    return np.asarray(uv, dtype=np.float64)[part.faces][..., :2]


def _complete_normals(normals: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Unit normals: the file's own where it has usable ones, computed ones elsewhere."""
    lengths = np.linalg.norm(normals, axis=-1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 1e-8)
    normals = np.where(usable, normals / np.where(usable, lengths, 1.0), 0.0)
    return normals if usable.all() else np.where(usable, normals, corner_normals(positions))


def corner_normals(positions: np.ndarray) -> np.ndarray:
    """Normals that are smooth over flat edges and break at sharp ones.

    A corner's normal is the area-weighted mean of the normals of those triangles around its point which are within
    CREASE_DEGREES of its own triangle.

    Args:
        positions: [faces, 3 corners, 3].

    Returns:
        [faces, 3 corners, 3] unit normals; triangles without area get +Z.
    """
    areas = np.cross(positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0])
    lengths = np.linalg.norm(areas, axis=-1, keepdims=True)
    flat = np.where(lengths > 0, areas / np.where(lengths > 0, lengths, 1.0), [0.0, 0.0, 1.0])

    point = _point_ids(positions.reshape(-1, 3))
    order = np.argsort(point, kind="stable")
    face = order // 3
    _, start, count = np.unique(point[order], return_index=True, return_counts=True)
    if int((count.astype(np.int64) ** 2).sum()) > MAX_CORNER_PAIRS:
        return np.repeat(flat[:, None], 3, axis=1)

    # Every corner is paired with every corner at the same point, itself included.
    partners = np.repeat(count, count)
    pair_start = np.cumsum(partners) - partners
    offset = np.arange(partners.sum()) - np.repeat(pair_start, partners)
    here = np.repeat(face, partners)
    there = face[np.repeat(np.repeat(start, count), partners) + offset]
    alike = np.einsum("ij,ij->i", flat[here], flat[there]) > np.cos(np.radians(CREASE_DEGREES))
    summed = np.add.reduceat(areas[there] * alike[:, None], pair_start, axis=0)
    summed_length = np.linalg.norm(summed, axis=-1, keepdims=True)
    smooth = np.where(summed_length > 0, summed / np.where(summed_length > 0, summed_length, 1.0), flat[face])

    result = np.empty_like(smooth)
    result[order] = smooth
    return result.reshape(-1, 3, 3)


def _point_ids(points: np.ndarray) -> np.ndarray:
    """[points] int64, the same number for points closer than about a millionth of the object's size."""
    low, high = points.min(axis=0), points.max(axis=0)
    grid = np.rint((points - low) / (high - low).max() * (2**20 - 1)).astype(np.int64)
    return (grid[:, 0] << 40) | (grid[:, 1] << 20) | grid[:, 2]
