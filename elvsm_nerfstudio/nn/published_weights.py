"""The authors' checkpoint layout and ours, both ways, without tolerance.

A published checkpoint holds the state dict under the key ``model``. Names may carry ``_orig_mod.`` (torch.compile)
or ``module.`` (DDP), and entries that only training uses may be there too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

# Official name, our name; {} stands for a layer's number.
_RENAMES = {
    "rgbp_tokenizer.1.weight": "context_tokenizer.weight",
    "target_pose_tokenizer.1.weight": "target_tokenizer.weight",
    "image_token_decoder.1.weight": "head.weight",
    "input_self_attn_blocks.{}.attn.to_qkv.weight": "context_blocks.{}.attention.to_qkv.weight",
    "input_self_attn_blocks.{}.attn.fc.weight": "context_blocks.{}.attention.to_out.weight",
    "input_self_attn_blocks.{}.attn.q_norm.weight": "context_blocks.{}.attention.q_norm.weight",
    "input_self_attn_blocks.{}.attn.k_norm.weight": "context_blocks.{}.attention.k_norm.weight",
    "input_self_attn_blocks.{}.mlp.mlp.0.weight": "context_blocks.{}.mlp.0.weight",
    "input_self_attn_blocks.{}.mlp.mlp.2.weight": "context_blocks.{}.mlp.2.weight",
    "self_cross_blocks.{}.self_attn.to_qkv.weight": "target_blocks.{}.self_attention.to_qkv.weight",
    "self_cross_blocks.{}.self_attn.fc.weight": "target_blocks.{}.self_attention.to_out.weight",
    "self_cross_blocks.{}.self_attn.q_norm.weight": "target_blocks.{}.self_attention.q_norm.weight",
    "self_cross_blocks.{}.self_attn.k_norm.weight": "target_blocks.{}.self_attention.k_norm.weight",
    "self_cross_blocks.{}.cross_attn.to_q.weight": "target_blocks.{}.cross_attention.to_q.weight",
    "self_cross_blocks.{}.cross_attn.to_kv.weight": "target_blocks.{}.cross_attention.to_kv.weight",
    "self_cross_blocks.{}.cross_attn.fc.weight": "target_blocks.{}.cross_attention.to_out.weight",
    "self_cross_blocks.{}.cross_attn.q_norm.weight": "target_blocks.{}.cross_attention.q_norm.weight",
    "self_cross_blocks.{}.cross_attn.k_norm.weight": "target_blocks.{}.cross_attention.k_norm.weight",
    "self_cross_blocks.{}.mlp.mlp.0.weight": "target_blocks.{}.mlp.0.weight",
    "self_cross_blocks.{}.mlp.mlp.2.weight": "target_blocks.{}.mlp.2.weight",
}
_TO_OURS = dict(_RENAMES)
_TO_PUBLISHED = {ours: published for published, ours in _RENAMES.items()}
_TRAINING_ONLY = ("loss_computer.", "repa_encoder.", "repa_projector.")


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    layer = re.search(r"\.(\d+)\.", name) if "blocks." in name else None
    if layer is None:
        return table.get(name)
    pattern = f"{name[: layer.start(1)]}{{}}{name[layer.end(1) :]}"
    return table[pattern].format(layer.group(1)) if pattern in table else None


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from the authors', and the names of entries skipped because only training uses them.

    Raises:
        ValueError: naming every entry that the official layout does not have.
    """
    ours: dict[str, Tensor] = {}
    skipped, unknown = [], []
    for name, tensor in state.items():
        plain = name.replace("_orig_mod.", "").replace("module.", "")
        if plain.startswith(_TRAINING_ONLY):
            skipped.append(name)
            continue
        renamed = _rename(plain, _TO_OURS)
        if renamed is None:
            unknown.append(name)
        else:
            ours[renamed] = tensor
    if unknown:
        raise ValueError(f"not an Efficient-LVSM checkpoint; unexpected entries: {', '.join(sorted(unknown))}")
    return ours, skipped


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names for our state dict."""
    return {_rename(name, _TO_PUBLISHED): tensor for name, tensor in state.items()}


def load_published(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Loads the authors' weights into a network and returns the names of skipped entries.

    Raises:
        ValueError: listing every missing, unexpected or misshaped tensor; the network is then untouched.
    """
    ours, skipped = from_published(state)
    check_state(network, ours)
    network.load_state_dict(ours)
    return skipped


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dict in a published checkpoint file, read without executing pickled code."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, alone or under the key 'model'")
    return state


def check_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError listing every tensor in which ``state`` differs from what the network expects."""
    expected = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in state.items()}
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"unexpected {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"{name}: found shape {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        raise ValueError("the weights do not fit this network:\n  " + "\n  ".join(problems))
