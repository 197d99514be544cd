"""Textures of rooms, made of numbers: wood, tiles, carpet, wallpaper, plaster, pictures, the sky behind a window.

All functions return [height, width, 3] float32 in [0, 1] and draw from the generator alone.
"""

from __future__ import annotations

import colorsys

import numpy as np


def colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """[3] a colour of any hue."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """[height, width] in about [-1, 1]: random values on a coarse grid, interpolated smoothly."""
    grid = rng.uniform(-1, 1, size=(cells[0] + 2, cells[1] + 2)).astype(np.float32)

    def interpolate(values: np.ndarray, size: int, count: int) -> np.ndarray:
        position = (np.arange(size) + 0.5) / size * count
        low = position.astype(int)
        t = (position - low)[:, None]
        t = t * t * (3 - 2 * t)
        return values[low] * (1 - t) + values[low + 1] * t

    rows = interpolate(grid, shape[0], cells[0])
    return interpolate(np.ascontiguousarray(rows.T), shape[1], cells[1]).T


def wood(rng: np.random.Generator, shape: tuple[int, int], metres: tuple[float, float]) -> np.ndarray:
    """Floor boards along the first axis, 12 to 20 cm wide.

    Args:
        shape: (height, width) in pixels.
        metres: what they cover.
    """
    height, width = shape
    board = rng.uniform(0.12, 0.2)
    base = np.array(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.1), rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.8)))
    x = (np.arange(width) + 0.5) / width * metres[1] / board
    y = (np.arange(height) + 0.5) / height * metres[0]
    number = x.astype(int)
    shift = rng.uniform(0, 2, size=number.max() + 1)
    piece = ((y[:, None] + shift[number][None]) / 1.6).astype(int)
    tone = rng.uniform(-0.13, 0.13, size=(number.max() + 1, piece.max() + 1))[number[None], piece]
    grain = smooth_noise(rng, shape, (6, max(8, width // 6))) * 0.05
    joint = ((x - number)[None] < 0.03) | (((y[:, None] + shift[number][None]) % 1.6) < 0.006)
    shade = (1 + tone + grain) * np.where(joint, 0.6, 1.0)
    return np.clip(base * shade[..., None], 0, 1).astype(np.float32)


def tiles(rng: np.random.Generator, shape: tuple[int, int], metres: tuple[float, float]) -> np.ndarray:
    """Square tiles of 20 to 45 cm, of one colour or chequered."""
    side = rng.uniform(0.2, 0.45)
    y, x = ((np.arange(n) + 0.5) / n * m / side for n, m in zip(shape, metres))
    first = colour(rng, (0.0, 0.25), (0.6, 0.9))
    second = first * rng.uniform(0.45, 0.8) if rng.uniform() < 0.5 else first
    odd = (y.astype(int)[:, None] + x.astype(int)[None]) % 2
    tone = rng.uniform(-0.05, 0.05, size=(int(y[-1]) + 1, int(x[-1]) + 1))[y.astype(int)[:, None], x.astype(int)[None]]
    picture = np.where(odd[..., None] == 1, first, second) * (1 + tone[..., None])
    joint = (y[:, None] % 1 < 0.025) | (x[None] % 1 < 0.025)
    picture = np.where(joint[..., None], 0.45, picture) + 0.02 * smooth_noise(rng, shape, (40, 40))[..., None]
    return np.clip(picture, 0, 1).astype(np.float32)


def carpet(rng: np.random.Generator, shape: tuple[int, int], metres: tuple[float, float]) -> np.ndarray:
    """A soft floor of one colour with slow variations."""
    base = colour(rng, (0.1, 0.5), (0.35, 0.75))
    cells = tuple(max(2, int(m * 3)) for m in metres)
    shade = 1 + 0.08 * smooth_noise(rng, shape, cells) + 0.06 * smooth_noise(rng, shape, (shape[0] // 4, shape[1] // 4))
    return np.clip(base * shade[..., None], 0, 1).astype(np.float32)


def plaster(rng: np.random.Generator, shape: tuple[int, int], metres: tuple[float, float]) -> np.ndarray:
    """A painted wall."""
    base = colour(rng, (0.02, 0.35), (0.75, 0.95))
    shade = 1 + 0.03 * smooth_noise(rng, shape, tuple(max(2, int(m * 2)) for m in metres))
    return np.clip(base * shade[..., None], 0, 1).astype(np.float32)


def stripes(rng: np.random.Generator, shape: tuple[int, int], metres: tuple[float, float]) -> np.ndarray:
    """Wallpaper with vertical stripes."""
    period = rng.uniform(0.15, 0.5)
    x = (np.arange(shape[1]) + 0.5) / shape[1] * metres[1] / period
    first = colour(rng, (0.05, 0.35), (0.7, 0.95))
    second = np.clip(first * rng.uniform(0.75, 0.92), 0, 1)
    edge = 1 / (1 + np.exp(-40 * (np.abs(x % 1 - 0.5) - rng.uniform(0.15, 0.35))))
    row = first * (1 - edge[:, None]) + second * edge[:, None]
    return np.broadcast_to(row, (*shape, 3)).astype(np.float32).copy()


def motifs(rng: np.random.Generator, shape: tuple[int, int], metres: tuple[float, float]) -> np.ndarray:
    """Wallpaper with a repeated round or diamond motif."""
    period = rng.uniform(0.2, 0.5)
    y, x = ((np.arange(n) + 0.5) / n * m / period for n, m in zip(shape, metres))
    row = np.floor(y)[:, None]
    dx, dy = np.abs((x[None] + 0.5 * (row % 2)) % 1 - 0.5), np.abs(y % 1 - 0.5)[:, None]
    distance = np.hypot(dx, dy) if rng.uniform() < 0.5 else dx + dy
    inside = 1 / (1 + np.exp(50 * (distance - rng.uniform(0.18, 0.35))))
    first = colour(rng, (0.05, 0.3), (0.75, 0.95))
    second = np.clip(0.55 * first + 0.45 * colour(rng, (0.3, 0.8), (0.4, 0.9)), 0, 1)
    return (first * (1 - inside[..., None]) + second * inside[..., None]).astype(np.float32)


def painting(rng: np.random.Generator, side: int = 96) -> np.ndarray:
    """Something to hang on a wall: blurred shapes of a few colours within a frame."""
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = colour(rng, (0.1, 0.6), (0.5, 0.95))
    y, x = np.mgrid[0:side, 0:side] / side
    for _ in range(rng.integers(4, 9)):
        centre, radius = rng.uniform(0.1, 0.9, size=2), rng.uniform(0.08, 0.35)
        angle, stretch = rng.uniform(0, np.pi), rng.uniform(0.4, 1.0)
        u = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
        v = (y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)
        share = 1 / (1 + np.exp(60 * (np.hypot(u, v / stretch) - radius)))
        picture += share[..., None] * (colour(rng, (0.3, 0.9), (0.2, 0.95)) - picture)
    border = max(3, side // 14)
    frame = colour(rng, (0.1, 0.6), (0.15, 0.6))
    for edge in (np.s_[:border], np.s_[-border:], np.s_[:, :border], np.s_[:, -border:]):
        picture[edge] = frame
    return np.clip(picture, 0, 1)


def window(rng: np.random.Generator, side: int = 160) -> np.ndarray:
    """A window's panes with sky, hills and bars."""
    y, x = np.mgrid[0:side, 0:side] / side
    sky = np.array([0.62, 0.78, 0.97]) * (1 - y[..., None]) + np.array([0.93, 0.95, 0.98]) * y[..., None]
    hill = 0.62 + 0.1 * np.sin(rng.uniform(4, 9) * x + rng.uniform(0, 6)) + 0.05 * np.sin(rng.uniform(9, 20) * x)
    land = colour(rng, (0.3, 0.5), (0.4, 0.7)) * np.array([0.8, 1.0, 0.7]) * (0.8 + 0.3 * x[..., None])
    picture = np.where((y > hill)[..., None], land, sky)
    bars = (np.abs(x - 0.5) < 0.02) | (np.abs(y - 0.5) < 0.02) | (np.minimum(x, y) < 0.05) | (np.maximum(x, y) > 0.95)
    picture[bars] = 0.92
    return np.clip(picture, 0, 1).astype(np.float32)


FLOORS = (wood, wood, tiles, carpet)
WALLS = (plaster, plaster, stripes, motifs)
