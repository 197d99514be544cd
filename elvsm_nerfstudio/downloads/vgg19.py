"""The weights of VGG-19 that the paper's perceptual loss looks through: MatConvNet's, from its authors' site."""

from __future__ import annotations

from pathlib import Path

from elvsm_nerfstudio.downloads.web import download
from elvsm_nerfstudio.training.vgg_files import FILES

URL = "https://www.vlfeat.org/matconvnet/models/imagenet-vgg-verydeep-19.mat"
MD5 = "106118b7cf60435e6d8e04f6a6dc3657"
"""As MatConvNet's own list of its models has it."""


def fetch(checkpoints: Path) -> Path:
    """Downloads the file, 576 MB, into a folder of checkpoints; one that is there already stays.

    Raises:
        FetchError: where it cannot be had or written, or is another file.
    """
    path = checkpoints / FILES["vgg19"].name
    if not path.is_file():
        download(URL, path, "md5", MD5)
    return path
