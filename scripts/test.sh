#!/usr/bin/env bash
# Lint, types, and all fast tests, in the environment of scripts/quickstart.sh plus the development tools.
# Usage: bash scripts/test.sh [pytest arguments], e.g. `bash scripts/test.sh -m slow`
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh objects,dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m basedpyright --level error
# A process for each of two cores, and one thread in each: more threads than cores slow torch down tenfold.
export OMP_NUM_THREADS=1
if [ $# = 0 ]; then # those of cameras, view sets and the network once more, with all tensors' shapes checked as they run
    .venv/bin/python -m pytest -q --jaxtyping-packages=elvsm_nerfstudio,beartype.beartype \
        tests/test_{cameras,geometry}.py tests/data/test_{evaluation_views,view_samplers}.py \
        tests/nn/test_{camera_encoding,kernels,layers,memory,official_step}.py
fi
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
