"""Files of weights: one reader for all of them, and the writer of ours.

Read are the weights-only files of this package (safetensors), checkpoints of its runs (``step-*.ckpt``) and what the
authors published (``.pt`` or ``.safetensors``). No pickled code is executed.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elvsm_nerfstudio.files import write_safetensors
from elvsm_nerfstudio.nn.named_weights import weights_path
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork
from elvsm_nerfstudio.nn.published_weights import LAYOUTS, check_state, from_published, is_published, our_config

FORMAT = "elvsm_nerfstudio.weights 1"
RUN_PREFIX = "_model.network."
"""Of the network's tensors in a run's checkpoint."""
_CONFIGS = {layout.config.__name__: layout.config for layout in LAYOUTS}


@dataclass(frozen=True)
class Weights:
    """The tensors of a network by our names, and which network that is."""

    state: dict[str, Tensor]
    config: NetworkConfig
    """As written into the file; where it does not say, what names and shapes tell, and defaults for the rest."""
    complete: bool
    """Whether all of the config is known: a camera encoding has no tensors that would tell."""


def read_weights(path: Path | str, config: Optional[NetworkConfig] = None) -> Weights:
    """Reads any file of weights; whose layout it has is told from its content.

    Args:
        path: of the file, or what stands for one: see ``named_weights.weights_path``.
        config: what is known from elsewhere about a file that does not say it itself.

    Raises:
        ValueError: naming the file, what was found and what was expected, also where it is damaged.
    """
    path = weights_path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {found}; expected a file of weights: .safetensors, .pt, or step-*.ckpt of a run")
    try:
        state, metadata = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
        if is_published(state):
            state, _ = from_published(state)
            return Weights(state, our_config(state), complete=True)  # the papers' networks have no other options
        if metadata.get("format") == FORMAT:
            return Weights(state, _written_config(metadata, state), complete=True)
        if config is not None and _has_sizes(config, state):
            return Weights(state, config, complete=True)
        return Weights(state, our_config(state), complete=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_weights(network: SceneNetwork, path: Path | str, config: Optional[NetworkConfig] = None) -> None:
    """Loads a file of weights into a network, whole or not at all; the network keeps its own dtype.

    Warns where the file does not say whether its network had the options of this one that have no tensors.

    Args:
        path: as in ``read_weights``.
        config: as in ``read_weights``.

    Raises:
        ValueError: as ``read_weights``, and where the weights are of another network, of other sizes or of another
            camera encoding.
    """
    weights = read_weights(path, config)
    by_shapes = our_config(network.state_dict())
    expected = network.config if weights.complete else by_shapes
    if not expected.is_same_as(weights.config):
        message = f"{path}: found weights of {_name(weights.config)}, expected {_name(expected)}"
        if our_config(weights.state).is_same_as(by_shapes):
            message += ". The tensors fit, but were trained with other options than those of this network"
        raise ValueError(message)
    try:
        check_state(network, weights.state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not network.config.is_same_as(weights.config):
        warnings.warn(
            f"{path} does not say which camera encoding it was trained with; it is taken as {_name(network.config)}",
            stacklevel=2,
        )
    network.load_state_dict(weights.state)


def load_network(weights: Path | str, config: Optional[NetworkConfig] = None) -> SceneNetwork:
    """The network that weights are of, ready to render: on the CPU, in fp32, without gradients.

    Args:
        weights: as in ``read_weights``.
        config: of the network; needed only for files that do not say it: checkpoints of runs of versions before 0.2.

    Raises:
        ValueError: as ``load_weights``, and where the config is needed and absent.
    """
    read = read_weights(weights, config)
    if not read.complete:
        raise ValueError(
            f"{weights} tells its sizes ({read.config.describe()}), but not its camera encoding; give the config of "
            "its network too, or write a file that says it: elvsm export --load-config RUN/config.yml"
        )
    network = read.config.build()
    check_state(network, read.state)
    network.load_state_dict(read.state)
    return network.eval().requires_grad_(False)


def save_weights(
    path: Path, state: Mapping[str, Tensor], config: NetworkConfig, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a network's weights, with all of its config, as safetensors: whole or not at all.

    Args:
        state: the network's state dict.
        dtype: of the weights in the file.

    Raises:
        OSError: where the file cannot be written.
        ValueError: for weights that the dtype cannot hold, or that are not finite.
    """
    rounded = {name: x.to(dtype) for name, x in state.items()}
    for name, x in rounded.items():
        if not x.isfinite().all():
            largest = float(state[name].abs().max())
            raise ValueError(
                f"{path}: {name} reaches {largest:g}; expected finite numbers up to {torch.finfo(dtype).max:g}, the "
                f"most that {dtype} holds. Write another dtype"
            )
    write_safetensors(path, rounded, network_metadata(config))


def network_metadata(config: NetworkConfig) -> dict[str, str]:
    """What files of weights say of their network: its config as JSON."""
    return {"format": FORMAT, "network": type(config).__name__, "config": json.dumps(asdict(config))}


def _is_safetensors(path: Path) -> bool:
    """By its name, as torch.load does, or by its beginning, a length and JSON: files of a hub may have no ending."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"damaged, or no safetensors file ({error})") from None


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    # Mapped, so that the optimiser's state in a run's checkpoint is not read; old files cannot be.
    mapped = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:  # whose text recommends to execute what is in the file
        raise ValueError("damaged, or no file of tensors alone") from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"damaged, or no file of tensors alone ({reason})") from None
    if isinstance(loaded, dict) and "pipeline" in loaded:
        metadata = loaded.get("network")
        return _of_run(loaded["pipeline"]), metadata if isinstance(metadata, dict) else {}
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError("expected a state dict of tensors, alone or under the key 'model'")
    return state, {}


def _of_run(pipeline: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's tensors in a run's checkpoint; what only training uses stays behind."""
    # With several GPUs the model is inside of DistributedDataParallel.
    plain = {name.replace("_model.module.", "_model.", 1): x for name, x in pipeline.items()}
    state = {name.removeprefix(RUN_PREFIX): x for name, x in plain.items() if name.startswith(RUN_PREFIX)}
    if not state:
        raise ValueError(f"a checkpoint of another method: expected tensors called {RUN_PREFIX}*")
    return state


def _written_config(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> NetworkConfig:
    try:
        config = _CONFIGS[metadata["network"]](**json.loads(metadata["config"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"written by another version of this package: unknown network or size ({error})") from None
    if not _has_sizes(config, state):
        raise ValueError(f"damaged: its config says {_name(config)}, its tensors are of {_name(our_config(state))}")
    return config


def _has_sizes(config: NetworkConfig, state: Mapping[str, Tensor]) -> bool:
    told = our_config(state)
    sizes = {name: size for name, size in config.computation().items() if isinstance(size, int)}
    return type(told) is type(config) and sizes.items() <= told.computation().items()


def _name(config: NetworkConfig) -> str:
    return f"{type(config).__name__.removesuffix('Config')} ({config.describe()})"
