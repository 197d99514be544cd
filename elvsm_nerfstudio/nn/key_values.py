"""What cross-attention needs of context tokens, kept so that it is computed once."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.nn.token_store import TokenStore

KeysValues = tuple[Float[Tensor, "scene head token head_dim"], Float[Tensor, "scene head token head_dim"]]


class KeyValueStore(TokenStore):
    """Cross-attention keys and values of context tokens in every layer."""

    PARTS = ("keys", "values")
