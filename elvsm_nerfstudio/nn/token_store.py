"""Where what a network remembers of a scene lies: buffers that grow, shared by every memory cut from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.nn.device_memory import require_bytes

Tokens = tuple[Float[Tensor, "scene head token channel"], ...]
"""What is remembered of tokens in one layer: a tensor for each of the store's ``PARTS``."""
KeysValues = tuple[Float[Tensor, "scene head token head_dim"], Float[Tensor, "scene head token head_dim"]]
"""The ``Tokens`` of a ``KeyValueStore``."""
Runs = Sequence[tuple[int, int]]
"""Stretches of tokens: (first, number)."""


class TokenStore:
    """What is remembered of context tokens in every layer, token after token, with room for more behind them.

    A token once written never changes, and new ones go where none has been before. So any number of memories may
    read one store and grow in it: none sees what another appended. (Not from two threads at once.)

    A store through which gradients flow is full from the start: nothing is ever written into it or copied from it.
    """

    PARTS: tuple[str, ...] = ("tokens",)
    """Names of the tensors that each layer has."""

    def __init__(self, layers: Iterable[Iterable[Float[Tensor, "scene capacity head channel"]]], used: int):
        # Tokens before heads: a view is then one block of memory, which makes appending and gathering several times
        # cheaper than with the heads outside; attention takes either equally well.
        self.layers = tuple(map(tuple, layers))
        self.used = used

    @classmethod
    def of(cls, layers: Iterable[Tokens]) -> TokenStore:
        """The store of given tokens of each layer, without room for more."""
        buffers = [[part.transpose(1, 2) for part in layer] for layer in layers]
        return cls(buffers, used=buffers[0][0].shape[1])

    @classmethod
    def allocate(
        cls, num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> TokenStore:
        """An empty store.

        Args:
            shape: scenes, capacity in tokens, heads, channels of a head.

        Raises:
            NotEnoughMemoryError: with the bytes needed and available, before any is taken.
        """
        needed = num_layers * len(cls.PARTS) * math.prod(shape) * dtype.itemsize
        require_bytes(needed, device, f"{' and '.join(cls.PARTS)} of {shape[0]} x {shape[1]} context tokens")
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffers = [[torch.empty(shape, dtype=dtype, device=device) for _ in cls.PARTS] for _ in range(num_layers)]
        return cls(buffers, used=0)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Scenes, capacity in tokens, heads, channels of a head."""
        scenes, capacity, heads, channels = self.layers[0][0].shape
        return scenes, capacity, heads, channels

    @property
    def num_scenes(self) -> int:
        return self.shape[0]

    @property
    def capacity(self) -> int:
        return self.shape[1]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of every scene in all layers."""
        scenes, _, heads, channels = self.shape
        return self.num_layers * len(self.PARTS) * scenes * heads * channels * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    @property
    def carries_gradients(self) -> bool:
        """Whether an operation on the tokens, here and now, would be recorded by autograd."""
        return torch.is_grad_enabled() and any(part.requires_grad for part in chain(*self.layers))

    def room(self) -> int:
        """Tokens that can still be written."""
        return self.capacity - self.used

    def take(self, tokens: int) -> int:
        """Sets room aside for tokens to be written and returns where it starts; it is never handed out again."""
        if tokens > self.room():
            raise ValueError(f"TokenStore.take: {tokens} tokens, room for {self.room()}")
        start, self.used = self.used, self.used + tokens
        return start

    def write(self, start: int, layer: int, tokens: Tokens) -> None:
        """Writes tokens of one layer, cast to the store's dtype and device, into room taken before."""
        for buffer, part in zip(self.layers[layer], tokens):
            # Through .data: autograd would otherwise count this as a change of tokens that it may have saved from
            # the front of the buffer, and refuse to go back through them.
            buffer.data[:, start : start + part.shape[2]].copy_(part.detach().transpose(1, 2))

    def read(self, layer: int, runs: Runs) -> Tokens:
        """Tokens of one layer: one run is a view onto the store, several are copied together.

        The copy is made at every read, not kept: on a CPU, decoding one target from every second of 8 to 64 views
        took as long as from as many in one piece (within 2 %), and keeping it would double the memory of a scene.
        """
        cut = (_cut(buffer, runs) for buffer in self.layers[layer])
        return tuple((torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]).transpose(1, 2) for pieces in cut)

    def copy(self, runs: Runs, capacity: int) -> TokenStore:
        """Some tokens, one run after another, in a store of their own with room for more.

        Args:
            capacity: tokens to make room for, the copied ones among them.
        """
        if self.carries_gradients:
            raise ValueError("TokenStore.copy: gradients flow through the tokens, and would end at the copy")
        scenes, _, heads, channels = self.shape
        store = self.allocate(self.num_layers, (scenes, capacity, heads, channels), self.dtype, self.device)
        start = store.take(sum(count for _, count in runs))
        for layer in range(self.num_layers):
            store.write(start, layer, self.read(layer, runs))
        return store

    def scene(self, index: int) -> TokenStore:
        """One scene of the batch, a view without room of its own."""
        return type(self)(
            ([part[index : index + 1, : self.used] for part in layer] for layer in self.layers), self.used
        )


class KeyValueStore(TokenStore):
    """Cross-attention keys and values of context tokens in every layer."""

    PARTS = ("keys", "values")


def _cut(buffer: Float[Tensor, "scene capacity head channel"], runs: Runs) -> list[Tensor]:
    # By index, not by narrow(): of a whole buffer that is the buffer, with nothing for autograd to go back through.
    return [buffer[:, start : start + count] for start, count in runs]
