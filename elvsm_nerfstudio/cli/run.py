"""Makes a run directory from weights, for any data and protocol, without training.

    elvsm run --weights pretrained --data DATA                # the weights that come with this package
    elvsm run --weights WEIGHTS --data DATA                   # published or exported weights
    elvsm run --weights pretrained --data DATA nerfstudio-data --downscale-factor 4
    elvsm run --weights pretrained --data DATA colmap --colmap-path sparse/0
    elvsm run --from-run outputs/.../config.yml --data DATA --protocol wide-range    # another run's

The scene that the run shows is opened and encoded before anything is written. Prints the new run's config.yml, with
which `ns-eval`, `ns-render` and `ns-viewer` work as with that of a run that was trained.
"""

from __future__ import annotations

from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.runs import RunOptions, make_run


def main(args: list[str]) -> None:
    """Command line."""
    print(make_run(parse(RunOptions, "run", __doc__, args)))
