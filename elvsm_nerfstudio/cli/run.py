"""Makes a run directory from weights, for any data and protocol, without training.

    elvsm run --weights pretrained --data DATA                # the weights that come with this package
    elvsm run --weights WEIGHTS --data DATA                   # published or exported weights
    elvsm run --from-run outputs/.../config.yml --data DATA --protocol wide-range    # another run's

Prints the new run's config.yml. nerfstudio's programs take everything from there: `ns-eval`, `ns-render` and
`ns-viewer` then work on it as on any run that was trained.
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.runs import RunOptions, make_run


def main(args: list[str]) -> None:
    """Command line."""
    print(make_run(parse(RunOptions, "run", __doc__, args)))
