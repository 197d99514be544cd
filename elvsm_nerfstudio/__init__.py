"""Efficient-LVSM, feed-forward novel view synthesis, for nerfstudio.

What is listed in ``__all__`` is imported when first used: nerfstudio loads this package while its own modules are half
imported, and ``import elvsm_nerfstudio`` alone costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elvsm_nerfstudio.captures import views_from_arrays, views_from_capture
    from elvsm_nerfstudio.nn.memory import load_memory
    from elvsm_nerfstudio.nn.weights import load_network
    from elvsm_nerfstudio.views import Views

__version__ = "0.2.0"
__all__ = ["Views", "load_memory", "load_network", "views_from_arrays", "views_from_capture"]

_MODULES = {
    "Views": "views",
    "load_memory": "nn.memory",
    "load_network": "nn.weights",
    "views_from_arrays": "captures",
    "views_from_capture": "captures",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
