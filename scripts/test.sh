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
if [ $# = 0 ]; then # some of each room once more, with types and tensors' shapes checked as they run
    .venv/bin/python -m pytest -q --numprocesses 2 --dist loadfile \
        --jaxtyping-packages=elvsm_nerfstudio,runtime_types.checked \
        tests/test_{cameras,geometry,model}.py tests/test_registration.py::test_entry_points_are_the_methods_names \
        tests/data/test_{augmentations,evaluation_views,formats,lenses,view_samplers}.py tests/evaluation/test_{metrics,protocols}.py \
        tests/nn/test_{camera_encoding,kernels,layers,memory,official_step}.py \
        tests/splatting/test_{photo_hull,plane_sweep,rasterizer,rendered_cameras,splatfacto_lvsm}.py \
        tests/splatting/test_splatfacto_sparse.py::test_{a_distorted_camera_is_rendered_through_its_lens,bad_input} \
        tests/splatting/test_splatfacto_sparse.py::test_{context_frames_are_ours,the_viewers_crop_box_and_sizes} \
        tests/training/test_{ema,optimizers,prefixes,psnr_loss,repa}.py \
        --deselect tests/evaluation/test_protocols.py::test_re10k_scores_every_scene_of_the_index_from_chunks `# 256 px` \
        --deselect tests/splatting/test_rasterizer.py::test_asking_for_gsplat_without_a_gpu_builds_nothing \
        --deselect tests/splatting/test_splatfacto_lvsm.py::test_from_training_to_a_splat # both start programs
fi
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
