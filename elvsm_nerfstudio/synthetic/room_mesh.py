"""A planned room as one textured mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from elvsm_nerfstudio.synthetic import room_textures as textures
from elvsm_nerfstudio.synthetic.furniture import CatalogueObject
from elvsm_nerfstudio.synthetic.object_mesh import ObjectMesh, Surface, load_object
from elvsm_nerfstudio.synthetic.room_layout import Placed, RoomPlan, WallPanel

PIXELS_PER_METRE = 128
SHADOW_BLUR = 0.12
"""Metres."""
SKIRTING_HEIGHT = 0.09
ROOM_MIPMAP_LEVEL = 8


@dataclass
class Part:
    """Triangles [faces, 3 corners, ...] with their surfaces."""

    positions: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    surfaces: list[Surface]


@lru_cache(maxsize=64)
def _furniture_mesh(item: CatalogueObject) -> ObjectMesh:
    return load_object(item.model, np.reshape(item.rotation, (3, 3)))


def build_room(rng: np.random.Generator, plan: RoomPlan) -> ObjectMesh:
    """Floor, walls, ceiling and everything in between, in the plan's coordinates (metres, +Z up)."""
    parts = [_floor(rng, plan), _ceiling(rng, plan), *_walls(rng, plan)]
    parts += [_panel(rng, plan, panel) for panel in plan.panels]
    parts += [_placed(piece) for piece in plan.furniture]
    surfaces, first_face = [], 0
    for part in parts:
        offset = first_face
        surfaces += [dataclasses.replace(s, first_face=offset + s.first_face) for s in part.surfaces]
        first_face += len(part.positions)
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("positions", "normals", "uvs"))
    return ObjectMesh(*(column.astype(np.float32) for column in columns), surfaces)


def _placed(piece: Placed) -> Part:
    """Furniture at its catalogue size, turned and put in its place."""
    mesh = _furniture_mesh(piece.item)
    corners = mesh.positions.reshape(-1, 3)
    scale = np.array(piece.item.size) / np.maximum(corners.max(axis=0) - corners.min(axis=0), 1e-6)
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[piece.quarter_turns]
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]], np.float32)
    centre = np.array([*piece.centre, piece.bottom + piece.item.size[2] / 2])
    normals = mesh.normals / scale
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    return Part((mesh.positions * scale) @ turn.T + centre, normals @ turn.T, mesh.uvs, list(mesh.surfaces))


def _quad(
    corner: np.ndarray,
    across: np.ndarray,
    up: np.ndarray,
    texture: np.ndarray | None,
    color: tuple[float, float, float] = (1.0, 1.0, 1.0),
    emission: float = 0.0,
) -> Part:
    """A rectangle from its lower left corner; its picture is upright for who looks along across x up reversed."""
    positions = np.stack([corner, corner + across, corner + across + up, corner, corner + across + up, corner + up])
    normal = np.cross(across, up)
    normals = np.broadcast_to(normal / np.linalg.norm(normal), (6, 3))
    uvs = np.array([[0, 0], [1, 0], [1, 1], [0, 0], [1, 1], [0, 1]], np.float32)
    rgba = None
    if texture is not None:
        rgba = np.full((*texture.shape[:2], 4), 255, np.uint8)
        rgba[..., :3] = np.rint(255 * texture)
    surface = Surface(0, 2, color, 1.0, rgba, emission, ROOM_MIPMAP_LEVEL)
    return Part(*(x.reshape(2, 3, -1) for x in (positions, normals, uvs)), [surface])


def _floor(rng: np.random.Generator, plan: RoomPlan) -> Part:
    width, depth, _ = plan.size
    shape = round(depth * PIXELS_PER_METRE), round(width * PIXELS_PER_METRE)
    kinds = (textures.tiles,) if plan.kind == "bathroom" else textures.FLOORS
    texture = kinds[rng.integers(len(kinds))](rng, shape, (depth, width))
    if plan.kind in ("living", "bedroom", "office") and rng.uniform() < 0.6:
        _lay_rug(rng, texture, plan)
    return _quad(
        np.zeros(3), np.array([width, 0, 0]), np.array([0, depth, 0]), texture * _shadows(plan, shape)[..., None]
    )


def _lay_rug(rng: np.random.Generator, texture: np.ndarray, plan: RoomPlan) -> None:
    width, depth, _ = plan.size
    size = rng.uniform(1.2, 2.2), rng.uniform(1.0, 1.8)
    left, top = (int(rng.uniform(0.3, m - s - 0.3) * PIXELS_PER_METRE) for m, s in zip((width, depth), size))
    columns, rows = (int(s * PIXELS_PER_METRE) for s in size)
    pattern = textures.motifs if rng.uniform() < 0.5 else textures.carpet
    rug = pattern(rng, (rows, columns), size[::-1]) * rng.uniform(0.5, 0.9)
    rug[:4], rug[-4:], rug[:, :4], rug[:, -4:] = (0.6 * rug.mean(axis=(0, 1)),) * 4
    texture[top : top + rows, left : left + columns] = rug


def _shadows(plan: RoomPlan, shape: tuple[int, int]) -> np.ndarray:
    """[height, width] light that reaches the floor: soft shadows below furniture. The first row is the far wall."""
    light = np.ones(shape, np.float32)
    y = plan.size[1] - (np.arange(shape[0]) + 0.5) / PIXELS_PER_METRE
    x = (np.arange(shape[1]) + 0.5) / PIXELS_PER_METRE

    def inside(values: np.ndarray, low: float, high: float) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip((np.minimum(values - low, high - values)) / (SHADOW_BLUR / 3), -30, 30)))

    for piece in plan.furniture:
        low, high = piece.box
        if low[2] < 0.3:
            light *= 1 - 0.55 * inside(y, low[1], high[1])[:, None] * inside(x, low[0], high[0])[None]
    return light


def _ceiling(rng: np.random.Generator, plan: RoomPlan) -> Part:
    width, depth, height = plan.size
    white = np.full((8, 8, 3), rng.uniform(0.85, 0.97), np.float32)
    return _quad(np.array([0, depth, height]), np.array([width, 0, 0]), np.array([0, -depth, 0]), white)


def _wall_frame(plan: RoomPlan, wall: int) -> tuple[Callable[[float, float, float], np.ndarray], np.ndarray, float]:
    """(along, height, distance from the wall) -> point; the direction along it; its length. See WallPanel.wall."""
    width, depth, _ = plan.size
    # Seen from inside, "along" runs to the right on walls 0 and 1, and to the left on the other two.
    if wall == 0:
        return lambda a, h, d: np.array([a, depth - d, h]), np.array([1.0, 0, 0]), width
    if wall == 1:
        return lambda a, h, d: np.array([d, a, h]), np.array([0, 1.0, 0]), depth
    if wall == 2:
        return lambda a, h, d: np.array([a, d, h]), np.array([1.0, 0, 0]), width
    return lambda a, h, d: np.array([width - d, a, h]), np.array([0, 1.0, 0]), depth


def _on_wall(plan: RoomPlan, wall: int, along: float, low: float, size: tuple[float, float], distance: float, **look):
    """A rectangle [width, height] on a wall, from its lower end ``along``, facing the room."""
    point, direction, _ = _wall_frame(plan, wall)
    up = np.array([0, 0, size[1]])
    if wall in (0, 1):
        return _quad(point(along, low, distance), direction * size[0], up, **look)
    return _quad(point(along + size[0], low, distance), -direction * size[0], up, **look)


def _walls(rng: np.random.Generator, plan: RoomPlan) -> list[Part]:
    _, _, height = plan.size
    paper = textures.WALLS[rng.integers(len(textures.WALLS))]
    accent = textures.plaster if paper is not textures.plaster and rng.uniform() < 0.5 else paper
    seed, accent_wall = int(rng.integers(2**31)), int(rng.integers(4))
    skirting = tuple(textures.colour(rng, (0.0, 0.3), (0.5, 0.95)))
    parts = []
    for wall in range(4):
        length = _wall_frame(plan, wall)[2]
        shape = round(height * PIXELS_PER_METRE), round(length * PIXELS_PER_METRE)
        kind, own_seed = (accent, seed + 1) if wall == accent_wall else (paper, seed)
        texture = kind(np.random.default_rng(own_seed), shape, (height, length))
        parts.append(_on_wall(plan, wall, 0.0, 0.0, (length, height), 0.0, texture=texture))
        parts.append(_on_wall(plan, wall, 0.0, 0.0, (length, SKIRTING_HEIGHT), 0.012, texture=None, color=skirting))
    return parts


def _panel(rng: np.random.Generator, plan: RoomPlan, panel: WallPanel) -> Part:
    texture = textures.window(rng) if panel.kind == "window" else textures.painting(rng)
    along, low = panel.along - panel.size[0] / 2, panel.centre_height - panel.size[1] / 2
    emission = 0.8 if panel.kind == "window" else 0.0
    return _on_wall(plan, panel.wall, along, low, panel.size, 0.02, texture=texture, emission=emission)
