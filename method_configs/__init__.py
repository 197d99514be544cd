"""Every method that this package gives nerfstudio: the targets of its entry points."""

from elvsm_nerfstudio.unavailable import Unavailable

try:
    from elvsm_nerfstudio.method_configs.efficient_lvsm import efficient_lvsm, efficient_lvsm_tiny
except Exception as error:  # whatever is broken, the other methods are not
    efficient_lvsm = efficient_lvsm_tiny = Unavailable(error)

__all__ = ["efficient_lvsm", "efficient_lvsm_tiny"]
