"""One training step as the official code takes it, written anew and plainly from a description of what it does.

Not a line of it is the official code's. Its perceptual and REPA losses are left out here and in what it is compared
with. On a CPU PyTorch's own attention stands in for xformers'. Tensors are called as in published checkpoints.
"""

from __future__ import annotations

from typing import Optional

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from elvsm_nerfstudio.nn.network import NetworkConfig

EPS = 1e-5


class Attention(nn.Module):
    """Self-attention, or cross-attention where keys and values are of other tokens; RMSNorm on queries and keys."""

    def __init__(self, width: int, head_dim: int, cross: bool):
        super().__init__()
        self.head_dim, self.cross = head_dim, cross
        if cross:
            self.to_q = nn.Linear(width, width, bias=False)
            self.to_kv = nn.Linear(width, 2 * width, bias=False)
        else:
            self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.fc = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=EPS)
        self.k_norm = nn.RMSNorm(head_dim, eps=EPS)

    def forward(
        self, x: Float[Tensor, "batch token d"], source: Optional[Float[Tensor, "batch source d"]] = None
    ) -> Float[Tensor, "batch token d"]:
        if self.cross:
            q, (k, v) = self.to_q(x), self.to_kv(source).chunk(2, dim=-1)
        else:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", d=self.head_dim) for y in (q, k, v))
        out = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.fc(rearrange(out, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        wide, narrow = nn.Linear(width, ratio * width, bias=False), nn.Linear(ratio * width, width, bias=False)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow)

    def forward(self, x: Float[Tensor, "batch token d"]) -> Float[Tensor, "batch token d"]:
        return self.mlp(x)


class InputBlock(nn.Module):
    """Self-attention and MLP, pre-norm."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=EPS, elementwise_affine=False)
        self.attn = Attention(config.width, config.head_dim, cross=False)
        self.norm2 = nn.LayerNorm(config.width, eps=EPS, elementwise_affine=False)
        self.mlp = MLP(config.width, config.mlp_ratio)

    def forward(self, x: Float[Tensor, "batch token d"]) -> Float[Tensor, "batch token d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SelfCrossBlock(nn.Module):
    """Self-attention, cross-attention to the input tokens of the same layer, MLP, all pre-norm."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=EPS, elementwise_affine=False)
        self.self_attn = Attention(config.width, config.head_dim, cross=False)
        self.cross_attn = Attention(config.width, config.head_dim, cross=True)
        self.mlp = MLP(config.width, config.mlp_ratio)

    def forward(
        self, x: Float[Tensor, "view token d"], source: Float[Tensor, "scene source d"], scenes: int
    ) -> Float[Tensor, "view token d"]:
        x = x + self.self_attn(self.norm(x))
        joint = rearrange(self.norm(x), "(b v) n d -> b (v n) d", b=scenes)
        gathered = self.cross_attn(joint, self.norm(source))
        x = x + rearrange(gathered, "b (v n) d -> (b v) n d", n=x.shape[1])
        return x + self.mlp(self.norm(x))


class UpstreamNetwork(nn.Module):
    """Images and Plücker maps, channels first, to images."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.patch = config.patch_size
        pixels = self.patch**2
        self.rgbp_tokenizer = nn.Sequential(nn.Identity(), nn.Linear(9 * pixels, config.width, bias=False))
        self.target_pose_tokenizer = nn.Sequential(nn.Identity(), nn.Linear(6 * pixels, config.width, bias=False))
        self.input_self_attn_blocks = nn.ModuleList(InputBlock(config) for _ in range(config.num_layers))
        self.self_cross_blocks = nn.ModuleList(SelfCrossBlock(config) for _ in range(config.num_layers))
        norm = nn.LayerNorm(config.width, eps=EPS, elementwise_affine=False)
        self.image_token_decoder = nn.Sequential(norm, nn.Linear(config.width, 3 * pixels, bias=False), nn.Sigmoid())

    def forward(
        self,
        image: Float[Tensor, "scene context 3 height width"],
        context_rays: Float[Tensor, "scene context 6 height width"],
        target_rays: Float[Tensor, "scene target 6 height width"],
    ) -> Float[Tensor, "scene target 3 height width"]:
        scenes, height, p = len(image), image.shape[-2], self.patch
        patches = "b v c (h p) (w q) -> (b v) (h w) (p q c)"
        context = torch.cat([image * 2 - 1, context_rays], dim=2)
        source = self.rgbp_tokenizer(rearrange(context, patches, p=p, q=p))
        x = self.target_pose_tokenizer(rearrange(target_rays, patches, p=p, q=p))
        for input_block, block in zip(self.input_self_attn_blocks, self.self_cross_blocks):
            source = input_block(source)
            x = block(x, rearrange(source, "(b v) n d -> b (v n) d", b=scenes), scenes)
        image = self.image_token_decoder(x)
        return rearrange(image, "(b v) (h w) (p q c) -> b v c (h p) (w q)", b=scenes, h=height // p, p=p, q=p)


def pluecker_maps(
    camera_to_world: Float[Tensor, "scene view 4 4"],
    fxfycxcy: Float[Tensor, "scene view 4"],
    height: int,
    width: int,
) -> Float[Tensor, "scene view 6 height width"]:
    """o x d and d of every pixel's centre, from cameras."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = x.to(fxfycxcy), y.to(fxfycxcy)
    fx, fy, cx, cy = fxfycxcy[..., None, None].unbind(dim=2)
    camera = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(fx * x)], dim=2)
    direction = F.normalize(torch.einsum("bvij,bvjhw->bvihw", camera_to_world[..., :3, :3], camera), dim=2)
    origin = camera_to_world[..., :3, 3, None, None].expand_as(direction)
    return torch.cat([torch.cross(origin, direction, dim=2), direction], dim=2)


class UpstreamStep:
    """Forward, backward, clipping at 5, skipping above 50, and fused AdamW.

    Args:
        dtype: of autocast; None for fp32.
    """

    def __init__(self, network: nn.Module, learning_rate: float, dtype: Optional[torch.dtype]):
        self.network, self.dtype = network, dtype
        decayed = [p for p in network.parameters() if p.ndim >= 2]
        others = [p for p in network.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def render(
        self,
        image: Float[Tensor, "scene context 3 height width"],
        context_cameras: tuple[Tensor, Tensor],
        target_cameras: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "scene target 3 height width"]:
        """Renders targets; cameras are camera-to-world in the canonical frame, and intrinsics in pixels."""
        height, width = image.shape[-2:]
        rays = [pluecker_maps(*cameras, height, width) for cameras in (context_cameras, target_cameras)]
        with torch.autocast(image.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.network(image, *rays)

    def __call__(
        self,
        image: Float[Tensor, "scene context 3 height width"],
        context_cameras: tuple[Tensor, Tensor],
        target_cameras: tuple[Tensor, Tensor],
        target: Float[Tensor, "scene target 3 height width"],
    ) -> float:
        """Takes a step and returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(self.render(image, context_cameras, target_cameras).float(), target)
        loss.backward()
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad.nan_to_num_(nan=0.0)
        norm = nn.utils.clip_grad_norm_(parameters, 5.0).item()
        if norm <= 50.0 and loss.isfinite():
            self.optimizer.step()
        return loss.item()
