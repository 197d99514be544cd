"""The plan of a furnished room: its walls, what stands in it, its light, and a walk through it. Numbers only.

A room spans [0, width] x [0, depth] x [0, height] in metres, +Z up. Furniture stands at its catalogue size, turned by
multiples of 90 degrees; turned by 0 it faces -Y, its back towards +Y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from elvsm_nerfstudio.synthetic.furniture import CatalogueObject

KINDS = {
    "living": ("Living room",),
    "bedroom": ("Bedroom", "Bedroom", "Living room"),
    "kitchen": ("Kitchen", "Kitchen", "Living room"),
    "office": ("Office", "Office", "Living room"),
    "bathroom": ("Bathroom",),
}
"""Catalogue categories of each kind of room, the more often named ones the more often taken."""
KIND_SHARES = (0.34, 0.24, 0.18, 0.18, 0.06)
UNSUITABLE = ("gun", "grenade", "helicopter", "boat", "tank", "pool table", "stair", "curtain", "shower", "pallet")
SINGLE = (
    "toilet",
    "washbasin",
    "sink",
    "bath",
    "bed",
    "tv",
    "fireplace",
    "cooker",
    "fridge",
    "refrigerator",
    "dispenser",
)
"""What a room has one of at most."""
ON_THE_FLOOR = ("bin", "basket", "stool", "shoe", "mat")
"""Small things that are not put on tables."""
MAX_MODEL_BYTES = 1_500_000
"""Larger OBJ files, of 25,000 triangles and more, take long to draw and show no more."""
FLOOR_SIDE = (0.3, 2.6)
"""Least and largest horizontal side of what stands on the floor."""
FLOOR_HEIGHT = (0.35, 2.3)
SMALL_SIDE = (0.08, 0.45)
"""Least and largest side of what is put on top of something."""
WALL_GAP = 0.03
CLEARANCE = 0.3
"""Metres that the camera keeps from walls and from boxes that reach up to it."""
HEADROOM = 0.7
"""Metres below the eye at which a box may be passed over."""
TOP_TOLERANCE = 0.02
"""Metres that the surface for other things may lie below the upper end of a piece of furniture: a table, not a seat."""
MAX_PAN_DEGREES = 40.0
FRAMES = (60, 100)
EYE_HEIGHT = (1.2, 1.7)
FIELD_OF_VIEW_DEGREES = (45.0, 70.0)
"""Horizontal."""
TRAVEL = (0.8, 2.4)
"""Metres from the first camera to the last."""


@dataclass(frozen=True)
class Placed:
    """A piece of furniture in the room."""

    item: CatalogueObject
    centre: tuple[float, float]
    bottom: float
    quarter_turns: int
    """Anticlockwise seen from above."""

    @property
    def footprint(self) -> tuple[float, float]:
        """Metres along X and Y."""
        width, depth, _ = self.item.size
        return (width, depth) if self.quarter_turns % 2 == 0 else (depth, width)

    @property
    def box(self) -> np.ndarray:
        """[2, 3] lower and upper corner."""
        half = np.array(self.footprint) / 2
        low, high = np.array(self.centre) - half, np.array(self.centre) + half
        return np.array([[*low, self.bottom], [*high, self.bottom + self.item.size[2]]])


@dataclass(frozen=True)
class WallPanel:
    """A picture or window on a wall, a rectangle of [width, height] around a point of the wall."""

    wall: int
    """0: y = depth, 1: x = 0, 2: y = 0, 3: x = width."""
    along: float
    """Centre along the wall, in metres from its lower end in X or Y."""
    centre_height: float
    size: tuple[float, float]
    kind: str
    """painting or window."""


@dataclass(frozen=True)
class Walk:
    """A camera path."""

    poses: np.ndarray
    """[frames, 4, 4] camera-to-world, OpenGL axes, metres."""
    field_of_view_degrees: float
    """Horizontal."""


@dataclass(frozen=True)
class RoomPlan:
    """A room and a walk through it."""

    kind: str
    size: tuple[float, float, float]
    furniture: tuple[Placed, ...]
    panels: tuple[WallPanel, ...]
    walk: Walk


def plan_room(rng: np.random.Generator, furniture: list[CatalogueObject]) -> RoomPlan:
    """Draws rooms until one has furniture and a walk through it.

    Raises:
        ValueError: if twenty in a row have none.
    """
    for _ in range(20):
        kind = str(rng.choice(list(KINDS), p=KIND_SHARES))
        size = (rng.uniform(3.4, 7.0), rng.uniform(3.4, 7.0), rng.uniform(2.4, 3.0))
        panels = _hang_panels(rng, size)
        placed = _furnish(rng, size, suitable(furniture, kind), panels)
        if len(placed) < 4:
            continue
        placed += _put_on_top(rng, size[2], placed, small_things(furniture, kind))
        walk = _find_walk(rng, size, placed)
        if walk is not None:
            return RoomPlan(kind, size, tuple(placed), tuple(panels), walk)
    raise ValueError("found no room with four pieces of furniture and a walk through it; expected more furniture")


def suitable(furniture: list[CatalogueObject], kind: str) -> list[list[CatalogueObject]]:
    """Pools to draw a room's furniture from, one for each mention of a category."""
    pools = []
    for category in KINDS[kind]:
        pool = [item for item in furniture if item.category == category and _may_be_used(item) and _fits_a_room(item)]
        if pool:
            pools.append(pool)
    return pools


def _fits_a_room(item: CatalogueObject) -> bool:
    width, depth, height = item.size
    wanted = FLOOR_SIDE[0] <= max(width, depth) <= FLOOR_SIDE[1] and min(width, depth) >= 0.15
    on_floor = item.elevation < 0.05 and FLOOR_HEIGHT[0] <= height <= FLOOR_HEIGHT[1]
    on_wall = 0.5 <= item.elevation <= 1.9 and height <= 1.0 and depth <= 0.5
    return wanted and (on_floor or on_wall)


def _may_be_used(item: CatalogueObject) -> bool:
    named = any(word in item.title.lower() for word in UNSUITABLE)
    return not named and item.model.stat().st_size <= MAX_MODEL_BYTES


def small_things(furniture: list[CatalogueObject], kind: str) -> list[CatalogueObject]:
    """What may stand on tables and cupboards of a kind of room."""
    return [
        item
        for item in furniture
        if item.category in KINDS[kind]
        and _may_be_used(item)
        and not any(word in item.title.lower() for word in ON_THE_FLOOR)
        and item.elevation < 0.05
        and SMALL_SIDE[0] <= item.size[2] <= SMALL_SIDE[1]
        and max(item.size[:2]) <= SMALL_SIDE[1]
        and min(item.size[:2]) >= 0.05
    ]


def _put_on_top(
    rng: np.random.Generator, height: float, placed: list[Placed], things: list[CatalogueObject]
) -> list[Placed]:
    """Small things on some of the furniture that the catalogue says things may be put on."""
    added: list[Placed] = []
    for piece in placed:
        top = piece.item.size[2]
        is_surface = piece.item.top is None or abs(piece.item.top - top) <= TOP_TOLERANCE
        if not things or not is_surface or not 0.3 <= top <= 1.1 or piece.bottom > 0:
            continue
        for _ in range(int(rng.integers(0, 3))):
            item = things[rng.integers(len(things))]
            room = 0.35 * np.array(piece.footprint) - np.array(item.size[:2]) / 2
            if (room <= 0).any():
                continue
            centre = np.array(piece.centre) + rng.uniform(-room, room)
            thing = Placed(item, tuple(centre), top, int(rng.integers(4)))
            if _apart(thing, added) and top + item.size[2] < height:
                added.append(thing)
    return added


def _hang_panels(rng: np.random.Generator, size: tuple[float, float, float]) -> list[WallPanel]:
    panels = []
    window_wall = int(rng.integers(4))
    for wall in range(4):
        length = size[0] if wall % 2 == 0 else size[1]
        if wall == window_wall:
            width, height = rng.uniform(1.0, min(2.0, length - 0.8)), rng.uniform(1.0, 1.4)
            panels.append(WallPanel(wall, length * rng.uniform(0.35, 0.65), 1.55, (width, height), "window"))
        elif rng.uniform() < 0.7:
            width, height = rng.uniform(0.4, 0.9), rng.uniform(0.4, 0.8)
            panels.append(
                WallPanel(wall, length * rng.uniform(0.2, 0.8), rng.uniform(1.5, 1.7), (width, height), "painting")
            )
    return panels


def _furnish(
    rng: np.random.Generator,
    size: tuple[float, float, float],
    pools: list[list[CatalogueObject]],
    panels: list[WallPanel],
) -> list[Placed]:
    placed: list[Placed] = []
    if not pools:
        return placed
    for _ in range(int(rng.integers(14, 26))):
        pool = pools[rng.integers(len(pools))]
        item = pool[rng.integers(len(pool))]
        title = item.title.lower()
        alike = sum(other.item.title == item.title for other in placed)
        if alike >= (1 if any(word in title for word in SINGLE) else 2):
            continue
        central = item.elevation < 0.05 and ("table" in title or rng.uniform() < 0.1)
        for _ in range(12):
            candidate = _in_the_middle(rng, size, item) if central else _at_a_wall(rng, size, item)
            if candidate is not None and _is_free(candidate, placed, size, panels):
                placed.append(candidate)
                if "table" in title and "bedside" not in title:
                    placed += _seats_around(rng, candidate, pools, placed, size, panels)
                break
    return placed


def _at_a_wall(rng: np.random.Generator, size: tuple[float, float, float], item: CatalogueObject) -> Placed | None:
    wall = int(rng.integers(4))
    length = size[0] if wall % 2 == 0 else size[1]
    width, depth, height = item.size
    if width > length - 0.2 or item.elevation + height > size[2] - 0.05:
        return None
    along = rng.uniform(width / 2 + 0.05, length - width / 2 - 0.05)
    away = depth / 2 + WALL_GAP
    centre = ((along, size[1] - away), (away, along), (along, away), (size[0] - away, along))[wall]
    return Placed(item, centre, item.elevation, wall)


def _in_the_middle(rng: np.random.Generator, size: tuple[float, float, float], item: CatalogueObject) -> Placed | None:
    turns = int(rng.integers(4))
    footprint = item.size[:2] if turns % 2 == 0 else item.size[1::-1]
    room = [size[i] - footprint[i] - 1.6 for i in (0, 1)]
    if min(room) < 0 or item.size[2] > 1.2:
        return None
    centre = tuple(0.8 + footprint[i] / 2 + rng.uniform(0, room[i]) for i in (0, 1))
    return Placed(item, centre, 0.0, turns)


def _seats_around(
    rng: np.random.Generator,
    table: Placed,
    pools: list[list[CatalogueObject]],
    placed: list[Placed],
    size: tuple[float, float, float],
    panels: list[WallPanel],
) -> list[Placed]:
    """Chairs of one kind on the sides of a table, facing it."""
    chairs = [item for pool in pools for item in pool if "chair" in item.title.lower() and max(item.size[:2]) < 0.9]
    if not chairs:
        return []
    chair = chairs[rng.integers(len(chairs))]
    seats: list[Placed] = []
    for side in range(4):
        if rng.uniform() < 0.35:
            continue
        # A chair that faces -Y stands on the table's +Y side.
        offset = np.array(table.footprint)[1 if side % 2 == 0 else 0] / 2 + chair.size[1] / 2 + 0.06
        direction = np.array(((0, 1), (-1, 0), (0, -1), (1, 0))[side])
        seat = Placed(chair, tuple(np.array(table.centre) + offset * direction), 0.0, side)
        if _is_free(seat, [*placed, *seats], size, panels):
            seats.append(seat)
    return seats


def _is_free(
    candidate: Placed, placed: list[Placed], size: tuple[float, float, float], panels: list[WallPanel]
) -> bool:
    low, high = candidate.box
    if (low < -1e-9).any() or (high > np.array(size)).any():
        return False
    if not _apart(candidate, placed):
        return False
    # Nothing tall in front of a window or a picture.
    for panel in panels:
        if candidate.quarter_turns == panel.wall and high[2] > panel.centre_height - panel.size[1] / 2:
            axis = 0 if panel.wall % 2 == 0 else 1
            near_wall = (size[1] - high[1], low[0], low[1], size[0] - high[0])[panel.wall] < 0.3
            if near_wall and abs(candidate.centre[axis] - panel.along) < (panel.size[0] + high[axis] - low[axis]) / 2:
                return False
    return True


def _apart(candidate: Placed, placed: list[Placed]) -> bool:
    low, high = candidate.box
    for other in placed:
        other_low, other_high = other.box
        if (low < other_high + 0.02).all() and (other_low < high + 0.02).all():
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The walk
# ---------------------------------------------------------------------------------------------------------------------


def _find_walk(rng: np.random.Generator, size: tuple[float, float, float], placed: list[Placed]) -> Walk | None:
    """The walk, of those drawn that touch nothing, from which most furniture is seen."""
    eye = rng.uniform(*EYE_HEIGHT)
    field_of_view = rng.uniform(*FIELD_OF_VIEW_DEGREES)
    num_frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    boxes = [piece.box for piece in placed]
    obstacles = [box for box in boxes if box[1, 2] > eye - HEADROOM and box[0, 2] < eye + HEADROOM]
    best, best_score = None, 0.0
    for _ in range(60):
        positions = _draw_positions(rng, size, eye, num_frames)
        if positions is None or not is_clear(positions, size, obstacles):
            continue
        yaw = rng.uniform(0, 2 * math.pi) + math.radians(rng.uniform(-1, 1) * MAX_PAN_DEGREES) * _ease(num_frames)
        pitch = math.radians(rng.uniform(-14, -3))
        score = min(_seen(positions[i], yaw[i], field_of_view, size, boxes) for i in (0, num_frames // 2, -1))
        if score > best_score:
            best_score = score
            poses = np.stack([_pose(p, y, pitch) for p, y in zip(positions, yaw)])
            best = Walk(poses, field_of_view)
    return best


def is_clear(positions: np.ndarray, size: tuple[float, float, float], boxes: list[np.ndarray]) -> bool:
    """Whether cameras at [frames, 3] keep their distance from walls and boxes."""
    planar = positions[:, :2]
    if (planar < CLEARANCE).any() or (planar > np.array(size[:2]) - CLEARANCE).any():
        return False
    for low, high in boxes:
        outside = np.maximum(np.maximum(low[:2] - planar, planar - high[:2]), 0)
        if (np.linalg.norm(outside, axis=1) < CLEARANCE).any():
            return False
    return True


def _ease(num_frames: int) -> np.ndarray:
    """[frames] from 0 to 1, steady in the middle and gentle at the ends."""
    t = np.linspace(0, 1, num_frames)
    return 0.6 * t + 0.4 * t * t * (3 - 2 * t)


def _draw_positions(
    rng: np.random.Generator, size: tuple[float, float, float], eye: float, num_frames: int
) -> np.ndarray | None:
    """[frames, 3] on a quadratic curve between two points of the floor, at eye height with a slow drift."""
    start = rng.uniform(CLEARANCE, np.array(size[:2]) - CLEARANCE)
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(*TRAVEL)
    end = start + length * np.array([math.cos(angle), math.sin(angle)])
    bend = (start + end) / 2 + rng.uniform(-0.2, 0.2) * length * np.array([-math.sin(angle), math.cos(angle)])
    t = _ease(num_frames)[:, None]
    planar = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    drift = eye + rng.uniform(-0.06, 0.06) * t
    return np.concatenate([planar, np.clip(drift, *EYE_HEIGHT)], axis=1)


def _seen(
    position: np.ndarray, yaw: float, field_of_view: float, size: tuple[float, float, float], boxes: list[np.ndarray]
) -> float:
    """How much there is to see: pieces of furniture in the middle of the view, at a good distance; 0 facing a wall."""
    forward = np.array([math.cos(yaw), math.sin(yaw)])
    with np.errstate(divide="ignore"):
        ahead = np.where(forward > 0, (np.array(size[:2]) - position[:2]) / forward, -position[:2] / forward).min()
    if ahead < 2.0:
        return 0.0
    score = 0.0
    for low, high in boxes:
        offset = (low[:2] + high[:2]) / 2 - position[:2]
        distance = float(np.linalg.norm(offset))
        cosine = float(offset @ forward) / max(distance, 1e-6)
        if distance > 0.9 and cosine > math.cos(math.radians(0.45 * field_of_view)):
            score += 1.0 if distance > 1.3 else 0.3
    return score


def _pose(position: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """[4, 4] camera-to-world, OpenGL axes, level horizon."""
    forward = np.array([math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(right, forward), -forward], axis=-1)
    pose[:3, 3] = position
    return pose
