"""PRoPE: attention that sees cameras and patches relative to one another.

Li et al. 2025, 'Cameras as Relative Positional Encoding': a token of view i at patch x has a matrix D that acts on the
channels of its head; attention is D_q A(D_q^T q, D_k^-1 k, D_k^-1 v), so that scores and results depend on D_q D_k^-1
alone. Here every factor belongs to one view: keys and values are transformed once, before they are kept.

Of a head's channels the first half is cut into fours, on which the view's projective matrix acts (normalised
intrinsics x world-to-camera), a quarter is rotated by the patch's row and a quarter by its column (RoPE). Queries and
keys are normalised before, as the transform must stay linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MAX_ANGLE, ANGLE_RANGE = 4 * math.pi, 100.0
"""Angle between opposite edges of an image at the highest frequency, and how many times smaller it is at the lowest:
DINOv3's choice. Positions are fractions of the image, so that views of other sizes mean the same by them."""


@dataclass(frozen=True)
class PatchRotation:
    """RoPE on half of a head's channels, which are pairs (i, i + d/4): the first d/8 turn by the row, the others by
    the column."""

    cos: Float[Tensor, "token half"]
    sin: Float[Tensor, "token half"]
    """Negative for the first channel of each pair."""

    @staticmethod
    def of(grid: tuple[int, int], head_dim: int, device: torch.device, dtype: torch.dtype) -> PatchRotation:
        """The rotation of a view's patches.

        Args:
            grid: rows and columns of patches.
            head_dim: a multiple of 8.
        """
        steps = torch.arange(head_dim // 8, device=device, dtype=torch.float32) / (head_dim // 8)
        frequencies = MAX_ANGLE * ANGLE_RANGE**-steps
        rows, columns = (
            ((torch.arange(count, device=device, dtype=torch.float32) + 0.5) / count)[:, None] * frequencies
            for count in grid
        )
        pairs = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
        angles = torch.cat(pairs, dim=-1).flatten(0, 1)
        cos, sin = angles.cos(), angles.sin()
        return PatchRotation(torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype))

    def forward(self, x: Float[Tensor, "*batch token half"]) -> Float[Tensor, "*batch token half"]:
        """Turns channels by their patch's angles."""
        return x * self.cos + _swap_pairs(x) * self.sin

    def backward(self, x: Float[Tensor, "*batch token half"]) -> Float[Tensor, "*batch token half"]:
        """Turns channels by the negative angles: the inverse, and the transpose, of ``forward``."""
        return x * self.cos - _swap_pairs(x) * self.sin


@dataclass(frozen=True)
class CameraEncoding:
    """The matrices D of views of one size, in one frame.

    Tensors to transform are [scene, head, view x token, head_dim]. Matrices come from fp32 and are applied in the
    precision of the attention.
    """

    query_matrix: Float[Tensor, "scene 1 view half half"]
    key_matrix: Float[Tensor, "scene 1 view half half"]
    output_matrix: Float[Tensor, "scene 1 view half half"]
    rotation: PatchRotation

    @staticmethod
    def of(
        camera_to_world: Float[Tensor, "scene view 4 4"],
        intrinsics: Float[Tensor, "scene view 4"],
        rotation: PatchRotation,
    ) -> CameraEncoding:
        """The encoding of pinhole cameras.

        Args:
            camera_to_world: OpenCV, rigid, in a frame in which centres are of the order of one.
            intrinsics: fx, fy, cx, cy, normalised by the image's size. Of other lenses than pinholes the nearest
                pinhole's: an approximation here, while the rays that are tokenized stay exact.
        """
        projection, inverse = projection_matrices(camera_to_world, intrinsics)
        dtype, blocks = rotation.cos.dtype, rotation.cos.shape[-1] // 4
        # Channels are rows of a matrix product, hence all is transposed; one product with a matrix of equal blocks
        # costs less than many with its 4x4 block.
        matrices = projection, inverse.mT, projection.mT
        queries, keys, outputs = (_repeat_block(matrix, blocks)[:, None].to(dtype) for matrix in matrices)
        return CameraEncoding(queries, keys, outputs, rotation)

    def within_view(self, x: Float[Tensor, "*batch token head_dim"]) -> Float[Tensor, "*batch token head_dim"]:
        """Queries or keys of attention within one view, where the camera cancels and patches alone matter."""
        still, turned = x.chunk(2, dim=-1)
        return torch.cat([still, self.rotation.backward(turned)], dim=-1)

    def queries(self, x: Float[Tensor, "scene head token head_dim"]) -> Float[Tensor, "scene head token head_dim"]:
        """D^T x, for queries, normalised."""
        return self._transform(x, self.query_matrix, self.rotation.backward)

    def keys(self, x: Float[Tensor, "scene head token head_dim"]) -> Float[Tensor, "scene head token head_dim"]:
        """D^-1 x, for normalised keys and for values."""
        return self._transform(x, self.key_matrix, self.rotation.backward)

    def outputs(self, x: Float[Tensor, "scene head token head_dim"]) -> Float[Tensor, "scene head token head_dim"]:
        """D x, for what attention gathered for the queries."""
        return self._transform(x, self.output_matrix, self.rotation.forward)

    @staticmethod
    def _transform(x: Tensor, matrix: Tensor, rotate) -> Tensor:
        projected, turned = x.unflatten(2, (matrix.shape[2], -1)).chunk(2, dim=-1)
        return torch.cat([projected @ matrix, rotate(turned)], dim=-1).flatten(2, 3)


def projection_matrices(
    camera_to_world: Float[Tensor, "scene view 4 4"], intrinsics: Float[Tensor, "scene view 4"]
) -> tuple[Float[Tensor, "scene view 4 4"], Float[Tensor, "scene view 4 4"]]:
    """World to image, homogeneous and lifted to 4x4, and its inverse, in closed form and fp32.

    The image's centre is the origin and its sides have length one, which keeps the matrices well conditioned.
    """
    poses = camera_to_world.float()
    rotation, centre = poses[..., :3, :3], poses[..., :3, 3:]
    world_to_camera = torch.eye(4, device=poses.device).repeat(*poses.shape[:-2], 1, 1)
    world_to_camera[..., :3, :3], world_to_camera[..., :3, 3:] = rotation.mT, -rotation.mT @ centre
    focal, offset = intrinsics.float()[..., :2], intrinsics.float()[..., 2:] - 0.5
    return _lift(focal, offset) @ world_to_camera, poses @ _lift(1 / focal, -offset / focal)


def _lift(focal: Float[Tensor, "*batch 2"], offset: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 4 4"]:
    diagonal = torch.diag_embed(torch.cat([focal, torch.ones_like(focal)], dim=-1))
    diagonal[..., :2, 2] = offset
    return diagonal


def _repeat_block(block: Float[Tensor, "*batch 4 4"], count: int) -> Float[Tensor, "*batch d d"]:
    """The block-diagonal matrix of ``count`` equal blocks."""
    eye = torch.eye(count, device=block.device)
    return torch.einsum("gh,...ij->...gihj", eye, block).flatten(-4, -3).flatten(-2, -1)


def _swap_pairs(x: Float[Tensor, "*batch half"]) -> Float[Tensor, "*batch half"]:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)
