"""Efficient-LVSM as a method of NerfBaselines: numpy in, numpy out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from nerfbaselines import Cameras, Dataset, Method, MethodInfo, ModelInfo, RenderOptions, RenderOutput
from nerfbaselines._types import camera_model_from_int
from nerfstudio.cameras.cameras import Cameras as NerfstudioCameras
from nerfstudio.cameras.cameras import CameraType
from PIL import Image

from elvsm_nerfstudio.cameras import views_from_cameras
from elvsm_nerfstudio.data.view_geometry import farthest_point_views
from elvsm_nerfstudio.geometry import cover_size, crop_offset, opengl_to_opencv, resize_and_crop_intrinsics
from elvsm_nerfstudio.nn.weights import load_network, save_weights

DEFAULTS = {"weights": "pretrained", "image_size": 64, "num_context_views": 8}
TYPES = {
    "pinhole": CameraType.PERSPECTIVE,
    "opencv": CameraType.PERSPECTIVE,
    "opencv_fisheye": CameraType.FISHEYE,
}


class EfficientLVSM(Method):
    """Encodes the photos that are spread best, once; renders at the size trained for and enlarges."""

    def __init__(
        self,
        *,
        checkpoint: Optional[str] = None,
        train_dataset: Optional[Dataset] = None,
        config_overrides: Optional[dict[str, Any]] = None,
    ):
        self.checkpoint = checkpoint
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if checkpoint is not None:
            folder = Path(checkpoint)
            self.options = json.loads((folder / "options.json").read_text())
            self.network = load_network(folder / "weights.safetensors")
            with np.load(folder / "context.npz") as context:
                self.context = {name: context[name] for name in context.files}
        else:
            if train_dataset is None:
                raise ValueError("EfficientLVSM needs a checkpoint or a train_dataset")
            unknown = set(config_overrides or {}) - set(DEFAULTS)
            if unknown:
                raise ValueError(f"found options {sorted(unknown)}; expected some of {list(DEFAULTS)}")
            values = {name: type(DEFAULTS[name])(value) for name, value in (config_overrides or {}).items()}
            self.options = {**DEFAULTS, **values}
            self.network = load_network(self.options["weights"])
            self.context = self._choose(train_dataset)
        self.network.to(self.device).eval()
        cameras = nerfstudio_cameras(**{name: x for name, x in self.context.items() if name != "images"})
        rgb = torch.from_numpy(self.context["images"]).float() / 255
        views = views_from_cameras(cameras, self.network.config.patch_size, rgb)
        with torch.no_grad():
            self.memory = self.network.encode(views.to(self.device))

    def _choose(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """Cameras and square images of the context views."""
        side, cameras = self.options["image_size"], dataset["cameras"]
        chosen = farthest_point_views(torch.from_numpy(cameras.poses).float(), self.options["num_context_views"])
        images, intrinsics = [], []
        for i in chosen:
            pixels = np.asarray(dataset["images"][i])
            width, height = map(int, cameras.image_sizes[i])
            pixels = pixels if pixels.dtype == np.uint8 else (pixels * 255).round().astype(np.uint8)
            image = Image.fromarray(pixels[:height, :width])
            if image.mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            resized = cover_size((height, width), (side, side))
            top, left = crop_offset(resized, (side, side))
            image = image.convert("RGB").resize(resized[::-1], Image.Resampling.LANCZOS)
            images.append(np.asarray(image.crop((left, top, left + side, top + side))))
            sizes = torch.tensor([height, width]), torch.tensor(resized)
            fitted = resize_and_crop_intrinsics(torch.from_numpy(cameras.intrinsics[i]).float(), *sizes, (side, side))
            intrinsics.append(fitted.numpy())
        return {
            "poses": cameras.poses[chosen],
            "intrinsics": np.stack(intrinsics),
            "camera_models": cameras.camera_models[chosen],
            "distortion_parameters": cameras.distortion_parameters[chosen],
            "image_sizes": np.full((len(chosen), 2), side),
            "images": np.stack(images),
        }

    @classmethod
    def get_method_info(cls) -> MethodInfo:
        return {
            "method_id": "",
            "required_features": frozenset(("color",)),
            "supported_camera_models": frozenset(TYPES),
            "supported_outputs": ("color",),
        }

    def get_info(self) -> ModelInfo:
        return {
            **self.get_method_info(),
            "num_iterations": 1,
            "loaded_step": None if self.checkpoint is None else 1,
            "loaded_checkpoint": self.checkpoint,
            "hparams": dict(self.options),
        }

    def train_iteration(self, step: int) -> dict[str, float]:
        """Nothing is trained on a scene."""
        return {}

    @torch.no_grad()
    def render(self, camera: Cameras, *, options: Optional[RenderOptions] = None) -> RenderOutput:
        camera = camera.item()
        width, height = map(int, camera.image_sizes)
        scale = self.options["image_size"] / min(width, height)
        small = np.maximum(np.round(camera.image_sizes * scale), 1).astype(int)
        target = nerfstudio_cameras(
            poses=camera.poses[None],
            intrinsics=(camera.intrinsics * np.tile(small / camera.image_sizes, 2))[None],
            camera_models=camera.camera_models[None],
            distortion_parameters=camera.distortion_parameters[None],
            image_sizes=small[None],
        )
        views = views_from_cameras(target, self.network.config.patch_size).to(self.device)
        rgb = self.network.decode(self.memory, views)[0, 0, : small[1], : small[0]]
        large = torch.nn.functional.interpolate(
            rgb.permute(2, 0, 1)[None].float(), (height, width), mode="bicubic", align_corners=False
        )
        return {"color": large[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy()}

    def save(self, path: str) -> None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / "weights.safetensors", self.network.state_dict(), self.network.config)
        np.savez(folder / "context.npz", **self.context)
        (folder / "options.json").write_text(json.dumps(self.options))


def nerfstudio_cameras(
    poses: np.ndarray,
    intrinsics: np.ndarray,
    camera_models: np.ndarray,
    distortion_parameters: np.ndarray,
    image_sizes: np.ndarray,
) -> NerfstudioCameras:
    """nerfstudio's cameras (OpenGL axes) of NerfBaselines' (OpenCV axes), all of one size."""
    names = [camera_model_from_int(int(model)) for model in camera_models]
    distortion = np.zeros((len(poses), 6), np.float32)
    given = distortion_parameters[:, :6]
    distortion[:, : given.shape[1]] = given
    distortion = distortion[:, [0, 1, 4, 5, 2, 3]]  # k1 k2 p1 p2 k3 k4 there, k1 k2 k3 k4 p1 p2 here
    intrinsics = torch.from_numpy(np.asarray(intrinsics, np.float32))
    return NerfstudioCameras(
        camera_to_worlds=opengl_to_opencv(torch.from_numpy(np.asarray(poses[:, :3], np.float32))),
        fx=intrinsics[:, 0:1],
        fy=intrinsics[:, 1:2],
        cx=intrinsics[:, 2:3],
        cy=intrinsics[:, 3:4],
        width=int(image_sizes[0, 0]),
        height=int(image_sizes[0, 1]),
        distortion_params=torch.from_numpy(distortion),
        camera_type=torch.tensor([[TYPES[name].value] for name in names]),
    )
