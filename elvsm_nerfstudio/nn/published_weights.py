"""The authors' checkpoint layouts and ours, both ways, without tolerance.

Names of a published state dict may carry ``_orig_mod.`` (torch.compile) or ``module.`` (DDP), and entries that only
training uses may be there too. Which network it is of is told from the names, its sizes from the shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.network import NetworkConfig


@dataclass(frozen=True)
class Layout:
    """How one network's tensors are called by the authors and by us; {} stands for a layer's number."""

    config: type[NetworkConfig]
    to_ours: dict[str, str]

    @property
    def to_published(self) -> dict[str, str]:
        return {ours: published for published, ours in self.to_ours.items()}


def _norm_gains(published: str, ours: str) -> dict[str, str]:
    return {f"{published}.{norm}.weight": f"{ours}.{norm}.weight" for norm in ("q_norm", "k_norm")}


def _self_attention(published: str, ours: str) -> dict[str, str]:
    return {
        f"{published}.to_qkv.weight": f"{ours}.to_qkv.weight",
        f"{published}.fc.weight": f"{ours}.to_out.weight",
        **_norm_gains(published, ours),
    }


def _mlp(published: str, ours: str) -> dict[str, str]:
    return {f"{published}.mlp.mlp.{linear}.weight": f"{ours}.mlp.{linear}.weight" for linear in (0, 2)}


def _lvsm_blocks(published: str, ours: str) -> dict[str, str]:
    return {
        f"{published}.norm1.weight": f"{ours}.norm1.weight",
        **_self_attention(f"{published}.attn", f"{ours}.attention"),
        f"{published}.norm2.weight": f"{ours}.norm2.weight",
        **_mlp(published, ours),
    }


_ENDS = {
    "target_pose_tokenizer.1.weight": "target_tokenizer.weight",
    "image_token_decoder.1.weight": "head.weight",
}
_LVSM_ENDS = {
    "image_tokenizer.1.weight": "context_tokenizer.weight",
    "image_token_decoder.0.weight": "head.norm.weight",
    **_ENDS,
}
_CROSS = ("self_cross_blocks.{}.cross_attn", "target_blocks.{}.cross_attention")

LAYOUTS = (
    Layout(
        EfficientLVSMConfig,
        {
            "rgbp_tokenizer.1.weight": "context_tokenizer.weight",
            **_ENDS,
            **_self_attention("input_self_attn_blocks.{}.attn", "context_blocks.{}.attention"),
            **_mlp("input_self_attn_blocks.{}", "context_blocks.{}"),
            **_self_attention("self_cross_blocks.{}.self_attn", "target_blocks.{}.self_attention"),
            f"{_CROSS[0]}.to_q.weight": f"{_CROSS[1]}.to_q.weight",
            f"{_CROSS[0]}.to_kv.weight": f"{_CROSS[1]}.to_kv.weight",
            f"{_CROSS[0]}.fc.weight": f"{_CROSS[1]}.to_out.weight",
            **_norm_gains(*_CROSS),
            **_mlp("self_cross_blocks.{}", "target_blocks.{}"),
        },
    ),
    Layout(
        LVSMDecoderOnlyConfig,
        {
            **_LVSM_ENDS,
            "transformer_input_layernorm.weight": "input_norm.weight",
            **_lvsm_blocks("transformer_blocks.{}", "decoder_blocks.{}"),
        },
    ),
    Layout(
        LVSMEncoderDecoderConfig,
        {
            **_LVSM_ENDS,
            "n_light_field_latent": "latents",
            "transformer_input_layernorm_decoder.weight": "input_norm.weight",
            **_lvsm_blocks("transformer_encoder.{}", "encoder_blocks.{}"),
            **_lvsm_blocks("transformer_decoder.{}", "decoder_blocks.{}"),
        },
    ),
)
_TRAINING_ONLY = ("loss_computer.", "repa_encoder.", "repa_projector.")


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    if name in table:
        return table[name]
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return None
    pattern = table.get(f"{name[: layer.start(1)]}{{}}{name[layer.end(1) :]}")
    return None if pattern is None else pattern.format(layer.group(1))


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    """The published layout that knows most of a state dict's names.

    Raises:
        ValueError: where none knows any.
    """
    names = [_plain(name) for name in state]
    return LAYOUTS[_knows_most(names, [layout.to_ours for layout in LAYOUTS])]


def _knows_most(names: Collection[str], tables: Sequence[Mapping[str, str]]) -> int:
    known = [sum(_rename(name, table) is not None for name in names) for table in tables]
    if not any(known):
        raise ValueError(f"not weights of Efficient-LVSM or LVSM; found {', '.join(sorted(names)[:5]) or 'nothing'}")
    return known.index(max(known))


def published_config(state: Mapping[str, Tensor]) -> NetworkConfig:
    """The network that the authors' state dict is of, and its sizes.

    Raises:
        ValueError: where it is of none.
    """
    return _sizes(layout_of(state).config, from_published(state)[0])


def our_config(state: Mapping[str, Tensor]) -> NetworkConfig:
    """The network that a state dict with our names is of, and its sizes.

    Raises:
        ValueError: where it is of none.
    """
    tables = [layout.to_published for layout in LAYOUTS]
    return _sizes(LAYOUTS[_knows_most(state, tables)].config, state)


def _sizes(config: type[NetworkConfig], ours: Mapping[str, Tensor]) -> NetworkConfig:
    mlps = [x for name, x in ours.items() if re.match(r"(target|decoder)_blocks\.\d+\.mlp\.0\.", name)]
    norms = [x for name, x in ours.items() if name.endswith("q_norm.weight")]
    if not mlps or not norms or "head.weight" not in ours:
        raise ValueError(f"{config.__name__}: the weights have no decoder or no head")
    values, width = ours["head.weight"].shape
    latents = {"num_latents": len(ours["latents"])} if "latents" in ours else {}
    return config(
        width=width,
        num_layers=len(mlps),
        head_dim=len(norms[0]),
        patch_size=math.isqrt(values // 3),
        mlp_ratio=len(mlps[0]) // width,
        **latents,
    )


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the authors' names rather than ours."""
    return any(_rename(_plain(name), layout.to_ours) for name in state for layout in LAYOUTS)


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from the authors', and the names of entries skipped because only training uses them.

    Raises:
        ValueError: naming every entry that the official layout does not have.
    """
    layout = layout_of(state)
    ours: dict[str, Tensor] = {}
    skipped, unknown = [], []
    for name, tensor in state.items():
        plain = _plain(name)
        if plain.startswith(_TRAINING_ONLY):
            skipped.append(name)
            continue
        renamed = _rename(plain, layout.to_ours)
        if renamed is None:
            unknown.append(name)
        else:
            ours[renamed] = tensor
    if unknown:
        network = layout.config.__name__.removesuffix("Config")
        raise ValueError(f"not a checkpoint of {network}; unexpected entries: {', '.join(sorted(unknown))}")
    return ours, skipped


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names for our state dict.

    Raises:
        ValueError: naming the entries that their layout has no place for.
    """
    tables = [layout.to_published for layout in LAYOUTS]
    table = tables[_knows_most(state, tables)]
    renamed = {_rename(name, table) or "": name for name in state}
    if "" in renamed:
        ours_alone = [name for name in state if _rename(name, table) is None]
        raise ValueError(f"the authors' layout has no place for {', '.join(ours_alone)}")
    return {published: state[name] for published, name in renamed.items()}


def load_published(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Loads the authors' weights into a network and returns the names of skipped entries.

    Raises:
        ValueError: listing every missing, unexpected or misshaped tensor; the network is then untouched.
    """
    ours, skipped = from_published(state)
    check_state(network, ours)
    network.load_state_dict(ours)
    return skipped


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
