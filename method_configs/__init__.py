"""Every method that this package gives nerfstudio: the targets of its entry points.

nerfstudio loads all plugins' entry points at every start and does not catch their errors, so a broken installation
of this package must not stop other methods: it is reported by nerfstudio's own warning instead.
"""

try:
    from elvsm_nerfstudio.method_configs.efficient_lvsm import efficient_lvsm, efficient_lvsm_tiny
except Exception as error:  # whatever is broken, the other methods are not

    class Unavailable:
        """Stands where a method should be; nerfstudio prints it and goes on."""

        def __init__(self, reason: Exception):
            self.reason = reason

        def __repr__(self) -> str:
            return f"elvsm_nerfstudio (cannot be imported: {type(self.reason).__name__}: {self.reason})"

    efficient_lvsm = efficient_lvsm_tiny = Unavailable(error)

__all__ = ["efficient_lvsm", "efficient_lvsm_tiny"]
