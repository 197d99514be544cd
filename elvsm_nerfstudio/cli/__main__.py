"""``python -m elvsm_nerfstudio.cli``, for environments whose programs are not on the PATH."""

from elvsm_nerfstudio.cli import main

main()
