"""Tiny posed scenes, made on the spot: coloured spheres seen from around, as nerfstudio data."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from PIL import Image

from elvsm_nerfstudio.geometry import opengl_to_opencv, pinhole_directions
from elvsm_nerfstudio.views import Views

warnings.filterwarnings("ignore")

SHARED = Path(__file__).parents[2] / "shared"
"""Real photos and recorded tensors, beside the checkout; tests that need them are skipped without."""

TINY_NETWORK = [
    "--pipeline.model.network.width", "32",
    "--pipeline.model.network.num-layers", "2",
    "--pipeline.model.network.head-dim", "16",
    "--pipeline.datamanager.image-size", "16", "16",
    "--pipeline.datamanager.num-context-views", "2",
    "--pipeline.datamanager.num-target-views", "2",
    "--pipeline.datamanager.scenes-per-batch", "2",
]  # fmt: skip


def need_shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the shared folder")
    return path


def look_at(position: torch.Tensor) -> torch.Tensor:
    """OpenGL camera-to-world [4, 4] at a position, looking at the origin, +Z of the world up."""
    backward = torch.nn.functional.normalize(position, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), backward), dim=0)
    pose = torch.eye(4)
    pose[:3] = torch.stack([right, torch.linalg.cross(backward, right), backward, position], dim=-1)
    return pose


def random_poses(count: int, generator: torch.Generator) -> torch.Tensor:
    """OpenGL camera-to-world [count, 4, 4] around the origin."""
    angle = torch.rand(count, generator=generator) * 6.283
    height = torch.rand(count, generator=generator) * 1.5 - 0.3
    return torch.stack([look_at(torch.stack([3 * a.cos(), 3 * a.sin(), h])) for a, h in zip(angle, height)])


def render_spheres(poses: torch.Tensor, intrinsics: torch.Tensor, height: int, width: int, seed: int) -> np.ndarray:
    """RGBA uint8 [view, height, width, 4] of three spheres; intrinsics fx, fy, cx, cy in pixels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(3, 3, generator=generator) - 0.5
    colours = torch.rand(3, 3, generator=generator)
    camera = opengl_to_opencv(poses)
    directions = pinhole_directions(intrinsics.expand(len(poses), 4), height, width)
    directions = torch.einsum("vij,vhwj->vhwi", camera[:, :3, :3], directions)
    offset = camera[:, None, None, None, :3, 3] - centres
    b = (offset * directions[..., None, :]).sum(-1)
    discriminant = b.square() - offset.square().sum(-1) + 0.35**2
    depth = torch.where(discriminant > 0, -b - discriminant.clamp(min=0).sqrt(), torch.inf)
    nearest = depth.argmin(dim=-1)
    hit = depth.amin(dim=-1).isfinite()
    rgba = torch.cat([colours[nearest], torch.ones_like(hit, dtype=torch.float)[..., None]], dim=-1)
    return (rgba * hit[..., None] * 255).round().byte().numpy()


def write_scene(folder: Path, num_frames: int = 8, size: tuple[int, int] = (20, 26), seed: int = 0) -> Path:
    """A nerfstudio scene of RGBA images of (height, width)."""
    height, width = size
    poses = random_poses(num_frames, torch.Generator().manual_seed(seed))
    intrinsics = torch.tensor([1.2 * width, 1.2 * width, width / 2 - 0.4, height / 2 + 0.3])
    (folder / "images").mkdir(parents=True)
    frames = []
    for i, image in enumerate(render_spheres(poses, intrinsics, height, width, seed)):
        Image.fromarray(image).save(folder / "images" / f"{i:03d}.png")
        frames.append({"file_path": f"images/{i:03d}.png", "transform_matrix": poses[i].tolist()})
    fx, fy, cx, cy = intrinsics.tolist()
    meta = {"camera_model": "OPENCV", "w": width, "h": height, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}
    (folder / "transforms.json").write_text(json.dumps({**meta, "frames": frames}))
    return folder


def write_collection(folder: Path, splits: str = "train train train train val test test", **scene) -> Path:
    """Scenes and their scenes.json; scene i is called ``scene_i``."""
    listed = []
    for i, split in enumerate(splits.split()):
        write_scene(folder / f"scene_{i}", seed=i, **scene)
        listed.append({"name": f"scene_{i}", "path": f"scene_{i}", "split": split})
    (folder / "scenes.json").write_text(json.dumps({"scenes": listed}))
    return folder


def sphere_scene(seed: int, num_frames: int = 8, size: tuple[int, int] = (36, 64)) -> dict:
    """A scene of RGB images of (height, width) as RealEstate10K's chunks hold it; ``jpegs`` are the images' bytes."""
    height, width = size
    poses = random_poses(num_frames, torch.Generator().manual_seed(seed))
    intrinsics = torch.tensor([0.9 * height, 0.9 * height, 0.5 * width, 0.5 * height])
    rgba = render_spheres(poses, intrinsics, height, width, seed)
    jpegs = []
    for image in rgba:
        file = io.BytesIO()
        Image.fromarray(image[..., :3] + (255 - image[..., 3:])).save(file, format="JPEG", quality=95)
        jpegs.append(file.getvalue())
    row = torch.zeros(num_frames, 18)
    row[:, :4] = intrinsics / torch.tensor([width, height, width, height])
    row[:, 6:] = torch.linalg.inv(opengl_to_opencv(poses))[:, :3].flatten(1)
    return {
        "key": f"{seed:016x}",
        "url": "",
        "timestamps": torch.arange(num_frames),
        "cameras": row,
        "images": [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs],
    }


def write_chunk_split(folder: Path, chunks: list[list[dict]]) -> Path:
    """A split in pixelSplat's layout: one list of scenes for each chunk, and the index."""
    folder.mkdir(parents=True)
    index = {}
    for number, scenes in enumerate(chunks):
        torch.save(scenes, folder / f"{number:06d}.torch")
        index.update({scene["key"]: f"{number:06d}.torch" for scene in scenes})
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def collection(tmp_path_factory) -> Path:
    """Seven scenes; read only."""
    folder = write_collection(tmp_path_factory.mktemp("collection"))
    index = {f"scene_{i}": {"context": [0, 2], "target": [1, 5, 6]} for i in (5, 6)}
    (folder / "evaluation_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def chunks(tmp_path_factory) -> Path:
    """Twelve train scenes in three chunks, three test scenes in one, and an index for two of those; read only."""
    folder = tmp_path_factory.mktemp("chunks") / "re10k"
    write_chunk_split(folder / "train", [[sphere_scene(4 * c + i) for i in range(4)] for c in range(3)])
    write_chunk_split(folder / "test", [[sphere_scene(20 + i) for i in range(3)]])
    index = {
        f"{20:016x}": {"context": [0, 4], "target": [1, 2, 4]},
        f"{21:016x}": {"context": [1, 5], "target": [2, 3, 4]},
    }
    (folder / "evaluation_index.json").write_text(json.dumps({**index, f"{22:016x}": None}))
    return folder


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> Path:
    """One scene of twelve frames; read only."""
    return write_scene(tmp_path_factory.mktemp("single") / "spheres", num_frames=12)


def make_views(num_scenes: int, num_views: int, height: int, width: int, seed: int = 0) -> Views:
    """Views of random colours from around the origin."""
    generator = torch.Generator().manual_seed(seed)
    poses = opengl_to_opencv(random_poses(num_scenes * num_views, generator)).unflatten(0, (num_scenes, num_views))
    intrinsics = torch.tensor([1.1 * width, 1.2 * width, 0.45 * width, 0.55 * height])
    directions = pinhole_directions(intrinsics, height, width).expand(num_scenes, num_views, height, width, 3)
    normalised = intrinsics / torch.tensor([width, height, width, height])
    rgb = torch.rand(num_scenes, num_views, height, width, 3, generator=generator)
    return Views(poses, directions, normalised.expand(num_scenes, num_views, 4), rgb)


def run_cli(*command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs one of nerfstudio's programs as a user would, from ``cwd``."""
    root = str(Path(__file__).parents[1])  # for `python -m scripts.…`
    environment = {
        **os.environ,
        "PYTHONPATH": root,
        "PYTHONWARNINGS": "ignore",
        "COLUMNS": "200",
        "WANDB_MODE": "offline",
    }
    given = [str(part) for part in command]
    if given[0] == "python":
        given[0] = sys.executable
        result = subprocess.run(given, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    else:
        result = programs.run(given, cwd, environment)
    if check and result.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result


def tiny_pipeline(
    data: Path,
    test_mode: str = "test",
    protocol: str | None = None,
    method: str = "efficient_lvsm_tiny",
    device: str = "cpu",
    **datamanager,
):
    """A method's pipeline over some data, small enough for a test, in fp32."""
    from copy import deepcopy
    from dataclasses import replace

    from elvsm_nerfstudio import method_configs

    config = deepcopy(getattr(method_configs, method).config.pipeline)
    sizes = dict(width=32, num_layers=2, head_dim=16, mlp_ratio=4, init_std=0.02)
    config.model.network = replace(config.model.network, **sizes)
    config.model.precision = "fp32"
    config.protocol = protocol
    options = dict(data=data, image_size=(16, 16), num_context_views=2, num_target_views=2, num_workers=0)
    for name, value in {**options, **datamanager}.items():
        assert hasattr(config.datamanager, name)
        setattr(config.datamanager, name, value)
    torch.manual_seed(0)
    pipeline = config.setup(device=device, test_mode=test_mode, world_size=1, local_rank=0)
    with torch.no_grad():
        for parameter in pipeline.model.network.parameters():
            parameter.mul_(3)
    return pipeline.eval()
