"""What an entry point gives nerfstudio when this package cannot be imported."""


class Unavailable:
    """Stands where a method or a dataparser should be.

    nerfstudio loads all plugins' entry points at every start and does not catch their errors, so a broken installation
    of this package must not stop other methods: nerfstudio prints this object in a warning and goes on.
    """

    def __init__(self, reason: Exception):
        self.reason = reason

    def __repr__(self) -> str:
        return f"elvsm_nerfstudio (cannot be imported: {type(self.reason).__name__}: {self.reason})"
