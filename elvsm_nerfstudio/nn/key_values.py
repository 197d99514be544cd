"""Where a scene's keys and values lie: buffers that grow at the end, shared by every memory cut from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.nn.device_memory import require_bytes

KeysValues = tuple[Float[Tensor, "scene head token head_dim"], Float[Tensor, "scene head token head_dim"]]
Runs = Sequence[tuple[int, int]]
"""Stretches of tokens: (first, number)."""


class KeyValueStore:
    """Cross-attention keys and values of every layer, token after token, with room for more behind them.

    A token once written never changes, and new ones go where none has been before. So any number of memories may
    read one store and grow in it: none sees what another appended. (Not from two threads at once.)

    A store through which gradients flow is full from the start: nothing is ever written into it.
    """

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "scene capacity head head_dim"]],
        values: Sequence[Float[Tensor, "scene capacity head head_dim"]],
        used: int,
    ):
        # Tokens before heads: a view is then one block of memory, which makes appending and gathering several times
        # cheaper than with the heads outside; attention takes either equally well.
        self.keys = tuple(keys)
        self.values = tuple(values)
        self.used = used

    @staticmethod
    def of(layers: Iterable[KeysValues]) -> KeyValueStore:
        """The store of given keys and values of each layer, without room for more."""
        keys, values = zip(*((k.transpose(1, 2), v.transpose(1, 2)) for k, v in layers))
        return KeyValueStore(keys, values, used=keys[0].shape[1])

    @staticmethod
    def allocate(
        num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KeyValueStore:
        """An empty store.

        Args:
            shape: scenes, capacity in tokens, heads, head_dim.

        Raises:
            NotEnoughMemoryError: with the bytes needed and available, before any is taken.
        """
        needed = 2 * num_layers * math.prod(shape) * dtype.itemsize
        require_bytes(needed, device, f"keys and values of {shape[0]} x {shape[1]} context tokens")
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * num_layers)]
        return KeyValueStore(buffers[:num_layers], buffers[num_layers:], used=0)

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def num_scenes(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of every scene in all layers, keys and values."""
        scenes, _, heads, head_dim = self.keys[0].shape
        return 2 * self.num_layers * scenes * heads * head_dim * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def carries_gradients(self) -> bool:
        """Whether an operation on the tokens, here and now, would be recorded by autograd."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (*self.keys, *self.values))

    def room(self) -> int:
        """Tokens that can still be written."""
        return self.capacity - self.used

    def take(self, tokens: int) -> int:
        """Sets room aside for tokens to be written and returns where it starts; it is never handed out again."""
        if tokens > self.room():
            raise ValueError(f"KeyValueStore.take: {tokens} tokens, room for {self.room()}")
        start, self.used = self.used, self.used + tokens
        return start

    def write(self, start: int, layer: int, keys_values: KeysValues) -> None:
        """Writes tokens of one layer, cast to the store's dtype and device, into room taken before."""
        for buffer, tokens in zip((self.keys[layer], self.values[layer]), keys_values):
            # Through .data: autograd would otherwise count this as a change of tokens that it may have saved from
            # the front of the buffer, and refuse to go back through them.
            buffer.data[:, start : start + tokens.shape[2]].copy_(tokens.detach().transpose(1, 2))

    def read(self, layer: int, runs: Runs) -> KeysValues:
        """Keys and values of one layer: one run is a view onto the store, several are copied together.

        The copy is made at every read, not kept: on a CPU, decoding one target from every second of 8 to 64 views
        took as long as from as many in one piece (within 2 %), and keeping it would double the memory of a scene.
        """
        keys, values = (
            torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
            for pieces in (_cut(self.keys[layer], runs), _cut(self.values[layer], runs))
        )
        return keys.transpose(1, 2), values.transpose(1, 2)

    def append(self, other: KeyValueStore, runs: Runs) -> int:
        """Copies tokens of another store behind this one's and returns where they start."""
        start = self.take(sum(count for _, count in runs))
        for layer in range(self.num_layers):
            self.write(start, layer, other.read(layer, runs))
        return start

    def copy(
        self,
        runs: Runs,
        capacity: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValueStore:
        """Some tokens, one run after another, in a store of their own.

        Args:
            capacity: tokens to make room for, the copied ones among them; by default those alone.
        """
        device, dtype = device or self.device, dtype or self.dtype
        if self.carries_gradients:
            layers = (self.read(layer, runs) for layer in range(self.num_layers))
            return KeyValueStore.of((k.to(device, dtype), v.to(device, dtype)) for k, v in layers)
        scenes, _, heads, head_dim = self.keys[0].shape
        shape = (scenes, capacity or sum(count for _, count in runs), heads, head_dim)
        store = KeyValueStore.allocate(self.num_layers, shape, dtype, device)
        store.append(self, runs)
        return store

    def joined(self, runs: Runs, other: KeyValueStore, other_runs: Runs) -> KeyValueStore:
        """Tokens of this store and then of another, differentiably, in a store of their own."""
        pairs = ((self.read(layer, runs), other.read(layer, other_runs)) for layer in range(self.num_layers))
        return KeyValueStore.of(
            (torch.cat([k, other_k], dim=2), torch.cat([v, other_v], dim=2)) for (k, v), (other_k, other_v) in pairs
        )

    def scene(self, index: int) -> KeyValueStore:
        """One scene of the batch, a view without room of its own."""
        keys, values = ([x[index : index + 1, : self.used] for x in part] for part in (self.keys, self.values))
        return KeyValueStore(keys, values, self.used)


def _cut(buffer: Float[Tensor, "scene capacity head head_dim"], runs: Runs) -> list[Tensor]:
    # By index, not by narrow(): of a whole buffer that is the buffer, with nothing for autograd to go back through.
    return [buffer[:, start : start + count] for start, count in runs]
