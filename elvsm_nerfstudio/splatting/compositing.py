"""Alpha compositing of projected Gaussians in plain torch, forwards and backwards.

The image is cut into blocks of 8 x 8 pixels, and blocks are taken together, those with about as many Gaussians in one
chunk: a dense tensor [block, Gaussian in depth order, pixel] that fits a core's cache. Exponents are quadratic in the
pixel's place within its block, so they and their gradients are matrix products. Backwards every chunk is computed
again, so that memory stays that of one chunk.

The rules are those of gsplat 1.4.0's CUDA kernels (rasterize_to_pixels_fwd.cu and _bwd.cu): alpha at most 0.999 and
then without gradient to what made it, left out below 1/255; a pixel ends before the Gaussian that would leave it a
transmittance of 1e-4 or less; a Gaussian is seen by whole tiles, those that the square of its radius touches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import threshold

BLOCK = 8
"""Pixels a side; tiles are made of whole blocks."""
CHUNK_PAIRS = 2048
"""Pairs of block and Gaussian in a chunk, 64 pixels each: half a megabyte for a tensor. Ours, measured."""
MIN_ALPHA = 1 / 255
MAX_ALPHA = 0.999
MIN_TRANSMITTANCE = 1e-4
INVISIBLE = -1e4
"""Log opacity of the Gaussian that fills up shorter lists."""


@dataclass(frozen=True)
class Chunk:
    """Blocks that are composited together, and what lies over each."""

    centres: Float[Tensor, "block 2"]
    """x and y in pixels."""
    blocks: Int[Tensor, " block"]
    """Row-major numbers of the blocks in the image."""
    gaussians: Int[Tensor, "block slot"]
    """In depth order; lists are filled up with N, the number of a Gaussian that nobody sees."""


def tile_bounds(
    means2d: Float[Tensor, "*batch 2"], radii: Int[Tensor, "*batch"], tile_size: int, width: int, height: int
) -> tuple[Int[Tensor, "*batch 2"], Int[Tensor, "*batch 2"]]:
    """First (inclusive) and last (exclusive) tile in x and y that the square of each radius touches."""
    tiles = means2d.new_tensor([-(-width // tile_size), -(-height // tile_size)])
    centre, radius = means2d / tile_size, radii[..., None] / tile_size
    seen = radii[..., None] > 0
    bounds = ((centre - radius).floor(), (centre + radius).ceil())
    first, last = (torch.minimum(bound.nan_to_num().clamp(min=0), tiles).long() * seen for bound in bounds)
    return first, last


@torch.no_grad()
def plan_chunks(
    means2d: Float[Tensor, "gaussian 2"],
    conics: Float[Tensor, "gaussian 3"],
    opacities: Float[Tensor, " gaussian"],
    radii: Int[Tensor, " gaussian"],
    depths: Float[Tensor, " gaussian"],
    tile_size: int,
    width: int,
    height: int,
) -> list[Chunk]:
    """Which Gaussians are composited over which blocks; pairs without a pixel above the least alpha are left out."""
    num_gaussians, device = len(means2d), means2d.device
    columns, rows = -(-width // BLOCK), -(-height // BLOCK)
    first, last = (bound * (tile_size // BLOCK) for bound in tile_bounds(means2d, radii, tile_size, width, height))

    # alpha >= 1/255 within the ellipse sigma <= ln(255 opacity); its bounding box has these half sides.
    reach = 2 * (opacities / MIN_ALPHA).log().clamp(min=0)
    determinant = conics[:, 0] * conics[:, 2] - conics[:, 1].square()
    half = (reach[:, None] * conics[:, [2, 0]] / determinant[:, None]).sqrt().nan_to_num(0.0, posinf=1e9) + 0.01
    pixels_first, pixels_last = (means2d - half - 0.5).ceil(), (means2d + half - 0.5).floor()
    first = torch.maximum(first, (pixels_first.clamp(0, 1e7) // BLOCK).long())
    last = torch.minimum(last, (pixels_last.clamp(-BLOCK, 1e7) // BLOCK).long() + 1)
    last = torch.minimum(last, last.new_tensor([columns, rows]))
    sides = (last - first).clamp(min=0) * (opacities >= MIN_ALPHA)[:, None]

    order = depths.argsort(stable=True)
    count = sides.prod(dim=-1)[order]
    pairs = int(count.sum())
    if pairs == 0:
        return []
    gaussian = order.repeat_interleave(count)
    within = torch.arange(pairs, device=device) - (count.cumsum(0) - count).repeat_interleave(count)
    across = sides[gaussian, 0]
    block = (first[gaussian, 1] + within // across) * columns + first[gaussian, 0] + within % across
    block, by_block = block.sort(stable=True)
    gaussian = gaussian[by_block]

    lengths = torch.bincount(block, minlength=columns * rows)
    starts = lengths.cumsum(0) - lengths
    lengths, blocks = lengths.sort(descending=True, stable=True)
    chunks, begin, counts = [], 0, lengths.tolist()
    while begin < len(counts) and counts[begin] > 0:
        slots = counts[begin]
        end = min(begin + max(1, CHUNK_PAIRS // slots), len(counts))
        chosen, slot = blocks[begin:end], torch.arange(slots, device=device)
        position = (starts[chosen][:, None] + slot).clamp(max=pairs - 1)
        listed = gaussian[position].masked_fill(slot >= lengths[begin:end, None], num_gaussians)
        corners = torch.stack([chosen % columns, chosen // columns], dim=-1) * BLOCK
        chunks.append(Chunk(corners.to(means2d) + BLOCK / 2, chosen, listed))
        begin = end
    return chunks


class Composite(torch.autograd.Function):
    """Colours over blocks of pixels, [block of the image, pixel, channel]; the last channel is alpha.

    Where ``absolute`` is given, the backward pass leaves in it the sums over pixels of the absolute gradients with
    respect to the projected means (AbsGS, gsplat's ``absgrad``).
    """

    @staticmethod
    def forward(
        ctx,
        means2d: Float[Tensor, "gaussian 2"],
        conics: Float[Tensor, "gaussian 3"],
        opacities: Float[Tensor, " gaussian"],
        colors: Float[Tensor, "gaussian channel"],
        chunks: list[Chunk],
        num_blocks: int,
        absolute: Float[Tensor, "gaussian 2"] | None,
    ) -> Float[Tensor, "block pixel channel+1"]:
        shapes, paints = _tables(means2d, conics, opacities, colors)
        basis = _pixel_basis(means2d)
        image = means2d.new_zeros(num_blocks, BLOCK * BLOCK, paints.shape[-1])
        for chunk in chunks:
            alpha, transmittance = _alphas(shapes[chunk.gaussians], chunk, basis)
            weight = alpha * transmittance
            image[chunk.blocks] = weight.transpose(1, 2) @ paints[chunk.gaussians]
        ctx.save_for_backward(means2d, conics, opacities, colors)
        ctx.chunks, ctx.absolute = chunks, absolute
        return image

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "block pixel channel_and_alpha"]):
        means2d, conics, opacities, colors = ctx.saved_tensors
        shapes, paints = _tables(means2d, conics, opacities, colors)
        basis = _pixel_basis(means2d)
        of_shapes = means2d.new_zeros(len(shapes), 6)
        of_paints = torch.zeros_like(paints)
        of_absolute = means2d.new_zeros(len(shapes), 2)
        for chunk in ctx.chunks:
            shape, paint = shapes[chunk.gaussians], paints[chunk.gaussians]
            alpha, transmittance = _alphas(shape, chunk, basis)
            arriving = gradient[chunk.blocks]
            of_weight = paint @ arriving.transpose(1, 2)
            weight = alpha * transmittance
            index = chunk.gaussians.flatten()
            of_paints.index_add_(0, index, (weight @ arriving).flatten(0, 1))
            # What lies behind a Gaussian is dimmed by its alpha.
            passed = weight.mul_(of_weight).cumsum(dim=1)
            behind = passed[:, -1:] - passed
            of_exponent = of_weight.mul_(transmittance).sub_(behind.div_(1 - alpha)).mul_(alpha)
            if alpha.max() >= MAX_ALPHA:
                of_exponent.mul_(1 - threshold(alpha, MAX_ALPHA * (1 - 1e-7), 0.0).sign_())
            moments = of_exponent @ basis.T
            offset, (a, b, c) = shape[..., :2] - chunk.centres[:, None], shape[..., 2:5].unbind(-1)
            of_shapes.index_add_(0, index, _from_moments(moments, offset, a, b, c).flatten(0, 1))
            if ctx.absolute is not None:
                u, v = offset.unbind(-1)
                slopes = torch.stack([torch.stack([-(a * u + b * v), a, b], -1),
                                      torch.stack([-(b * u + c * v), b, c], -1)])  # fmt: skip
                size = of_exponent.abs_()
                sums = [(slope @ basis[:3]).abs_().mul_(size).sum(dim=-1) for slope in slopes]
                of_absolute.index_add_(0, index, torch.stack(sums, dim=-1).flatten(0, 1))
        if ctx.absolute is not None:
            ctx.absolute.copy_(of_absolute[:-1])
        of_means, of_conics, of_log_opacity = of_shapes[:-1].split((2, 3, 1), dim=-1)
        of_opacities = of_log_opacity[:, 0] / opacities.clamp(min=MIN_ALPHA)
        return of_means, of_conics, of_opacities, of_paints[:-1, :-1], None, None, None


def _tables(
    means2d: Float[Tensor, "gaussian 2"],
    conics: Float[Tensor, "gaussian 3"],
    opacities: Float[Tensor, " gaussian"],
    colors: Float[Tensor, "gaussian channel"],
) -> tuple[Float[Tensor, "gaussian+1 6"], Float[Tensor, "gaussian+1 channel+1"]]:
    """Mean, conic and log opacity, and colours with a channel of ones for alpha; a last row that nobody sees."""
    log_opacity = opacities.clamp(min=MIN_ALPHA / 2).log()
    shapes = torch.cat([means2d, conics, log_opacity[:, None]], dim=-1)
    paints = torch.cat([colors, torch.ones_like(colors[:, :1])], dim=-1)
    nobody = shapes.new_tensor([[0, 0, 0, 0, 0, INVISIBLE]])
    return torch.cat([shapes, nobody]), torch.cat([paints, torch.zeros_like(paints[:1])])


def _pixel_basis(like: Tensor) -> Float[Tensor, "6 pixel"]:
    """1, x, y, x^2, xy, y^2 of the pixel centres of a block, from its centre."""
    steps = torch.arange(BLOCK, device=like.device, dtype=like.dtype) + 0.5 - BLOCK / 2
    y, x = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])


def _alphas(
    shape: Float[Tensor, "block slot 6"], chunk: Chunk, basis: Float[Tensor, "6 pixel"]
) -> tuple[Float[Tensor, "block slot pixel"], Float[Tensor, "block slot pixel"]]:
    """Alpha of each Gaussian at each pixel, zero where it does not count, and the transmittance before it."""
    u, v = (shape[..., :2] - chunk.centres[:, None]).unbind(-1)
    a, b, c, log_opacity = shape[..., 2:].unbind(-1)
    constant = log_opacity - 0.5 * (a * u * u + c * v * v) - b * u * v
    coefficients = torch.stack([constant, a * u + b * v, c * v + b * u, -0.5 * a, -b, -0.5 * c], dim=-1)
    alpha = threshold((coefficients @ basis).exp_().clamp_(max=MAX_ALPHA), MIN_ALPHA, 0.0)
    blocks, slots, pixels = alpha.shape
    transmittance = alpha.new_ones(blocks, slots + 1, pixels)
    torch.cumprod(1 - alpha, dim=1, out=transmittance[:, 1:])
    if transmittance[:, -1].min() <= MIN_TRANSMITTANCE:
        alpha.mul_(threshold(transmittance[:, 1:], MIN_TRANSMITTANCE, 0.0).sign_())
    return alpha, transmittance[:, :-1]


def _from_moments(
    moments: Float[Tensor, "block slot 6"], offset: Float[Tensor, "block slot 2"], a: Tensor, b: Tensor, c: Tensor
) -> Float[Tensor, "block slot 6"]:
    """Gradients of mean, conic and log opacity from the moments over pixels of the exponent's gradient."""
    u, v = offset.unbind(-1)
    m, mx, my, mxx, mxy, myy = moments.unbind(-1)
    du, dv = mx - u * m, my - v * m
    return torch.stack(
        [
            a * du + b * dv,
            b * du + c * dv,
            -0.5 * (mxx - 2 * u * mx + u * u * m),
            -(mxy - u * my - v * mx + u * v * m),
            -0.5 * (myy - 2 * v * my + v * v * m),
            m,
        ],
        dim=-1,
    )
