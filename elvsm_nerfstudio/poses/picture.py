"""A picture of cameras and sparse points: from above and from the side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elvsm_nerfstudio.evaluation.report import write_figure

if TYPE_CHECKING:
    import pycolmap

SHOWN = 0.9
"""Share of the points, those nearest to their middle, that the picture is cut to."""


def write_picture(path: Path, model: pycolmap.Reconstruction) -> None:
    """Writes the picture as a PNG: points in their colours, cameras as arrowheads in order of their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    images = sorted((model.image(id) for id in model.reg_image_ids()), key=lambda image: image.name)
    poses = np.stack([image.cam_from_world().inverse().matrix() for image in images])  # OpenCV axes
    points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    colours = np.array([point.color for point in model.points3D.values()]).reshape(-1, 3) / 255

    up = -poses[:, :, 1].mean(axis=0)
    up = up / max(np.linalg.norm(up), 1e-9)
    side = np.linalg.svd(np.eye(3) - np.outer(up, up))[0][:, 0]
    axes = {"from above": (side, np.cross(up, side)), "from the side": (side, up)}
    middle = np.median(points, axis=0)
    near = np.linalg.norm(points - middle, axis=1)
    shown = near <= np.quantile(near, SHOWN)
    size = 0.06 * np.ptp(np.concatenate([poses[:, :, 3], points[shown]]), axis=0).max()

    figure, panels = plt.subplots(1, 2, figsize=(11, 5.5), dpi=100, layout="constrained")
    order = plt.get_cmap("viridis")(np.linspace(0, 1, len(poses)))
    for panel, (title, flat) in zip(panels, axes.items()):
        x, y = ((points[shown] - middle) @ np.stack(flat).T).T
        panel.scatter(x, y, s=1.5, c=colours[shown], linewidths=0)
        for pose, colour in zip(poses, order):
            corner = size * np.array([[0, 0, 0], [-0.6, 0, 1], [0.6, 0, 1], [0, 0, 0], [0, -0.4, 1], [0, 0.4, 1]])
            outline = (corner @ pose[:, :3].T + pose[:, 3] - middle) @ np.stack(flat).T
            panel.fill(*outline.T, facecolor=(*colour[:3], 0.3), edgecolor=colour, linewidth=0.8)
        panel.set_aspect("equal")
        panel.set_title(f"{title}: {len(poses)} cameras, {len(points)} points" if panel is panels[0] else title)
        panel.set_xticks([])
        panel.set_yticks([])
    write_figure(path, figure)
