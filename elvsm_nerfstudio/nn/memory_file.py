"""Scene memories in files: safetensors, with everything needed to render from them except the network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.memory import SceneMemory, StoredView
from elvsm_nerfstudio.nn.network import SceneNetwork
from elvsm_nerfstudio.nn.weights import write_safetensors

FORMAT = "elvsm_nerfstudio.SceneMemory 1"
_FRAME = ("axes", "centre", "scale")


class MemoryFileError(ValueError):
    """A file that is no memory, is damaged, or was made by another network. The message names the file."""


def save_memory(path: Path, memory: SceneMemory, network: SceneNetwork) -> None:
    """Writes a memory, its views alone: whole or not at all, never half a file.

    Args:
        network: what encoded the memory.

    Raises:
        ValueError: where it was not encoded by the network's present weights.
        OSError: where the file cannot be written.
    """
    if memory.weights is not network.weights_token():
        raise ValueError(f"{path}: the memory was encoded by other weights than the network has now")
    tensors = {"camera_to_world": memory.camera_to_world, "intrinsics": memory.intrinsics}
    tensors |= {f"frame.{name}": getattr(memory.frame, name) for name in _FRAME}
    for layer in range(memory.num_layers):
        tokens = zip(memory.store.PARTS, memory.read(layer))
        tensors |= {f"{part}.{layer}": tensor.transpose(1, 2) for part, tensor in tokens}
    metadata = {
        "format": FORMAT,
        "network": network.architecture,
        "fingerprint": network.fingerprint(),
        "views": json.dumps([(view.id, view.start, view.tokens) for view in memory.packed(0)]),
        "next_id": str(memory.next_id),
    }
    write_safetensors(path, tensors, metadata)


def load_memory(path: Path, network: SceneNetwork, device: torch.device | str = "cpu") -> SceneMemory:
    """Reads a memory onto a device, in the precision in which it was written.

    Raises:
        MemoryFileError: for what is no memory, is damaged or cut short, or was encoded by another network.
        NotEnoughMemoryError: with the bytes needed and available.
    """
    try:
        with safe_open(path, "pt") as file:
            _check_origin(path, file.metadata() or {}, network)
            return _read(file, network, torch.device(device))
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise MemoryFileError(f"{path} is not a scene memory, or is damaged: {error}") from error


def _check_origin(path: Path, metadata: dict[str, str], network: SceneNetwork) -> None:
    if metadata.get("format") != FORMAT:
        raise MemoryFileError(f"{path}: found format {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata["network"] != network.architecture:
        raise MemoryFileError(
            f"{path}: encoded by another architecture, {metadata['network']}; this network is {network.architecture}"
        )
    expected = network.fingerprint()
    if metadata["fingerprint"] != expected:
        raise MemoryFileError(
            f"{path}: encoded by other weights (fingerprint {metadata['fingerprint']}, this network's is {expected}); "
            "encode the views again"
        )


def _read(file, network: SceneNetwork, device: torch.device) -> SceneMemory:
    parts, (num_layers, *_) = network.store_type.PARTS, network.memory_layout
    first = file.get_tensor(f"{parts[0]}.0")
    store = network.store_type.allocate(num_layers, tuple(first.shape), first.dtype, device)
    start = store.take(store.capacity)
    for layer in range(store.num_layers):
        store.write(start, layer, tuple(file.get_tensor(f"{part}.{layer}").transpose(1, 2) for part in parts))
    metadata = file.metadata()
    # Copies: what safetensors returns is mapped from the file, which may be gone before the memory is.
    cameras = (file.get_tensor(name).to(device, copy=True) for name in ("camera_to_world", "intrinsics"))
    frame = CanonicalFrame(*(file.get_tensor(f"frame.{name}").to(device, copy=True) for name in _FRAME))
    views = tuple(StoredView(*view) for view in json.loads(metadata["views"]))
    return SceneMemory(store, views, *cameras, frame, network.weights_token(), int(metadata["next_id"]))
