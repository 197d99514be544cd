#!/usr/bin/env bash
# From nothing to rendered new views of unseen objects, on a CPU: installs, renders an object set, trains
# efficient-lvsm-tiny, evaluates it on held-out objects and renders an orbit. Whatever is there already is reused.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh objects
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore

steps=1600
data=data/objects64
run=outputs/quickstart/efficient-lvsm-tiny/run
results=outputs/quickstart/results
last=$run/nerfstudio_models/step-$(printf '%09d' $((steps - 1))).ckpt

echo "== 1/4 Objects: $data"
python scripts/make_object_scenes.py --output $data --resolution 64 --views-per-object 24

if [ -f "$last" ]; then
    echo "== 2/4 Training: reusing $last"
else
    echo "== 2/4 Training efficient-lvsm-tiny, $steps steps"
    ns-train efficient-lvsm-tiny --data $data --output-dir outputs --experiment-name quickstart --timestamp run \
        --machine.device-type cpu --vis tensorboard --max-num-iterations $steps --logging.steps-per-log 100 \
        --pipeline.datamanager.scene scopia-armchair2 --optimizers.network.scheduler.max-steps $steps
fi

echo "== 3/4 Evaluating held-out objects"
ns-eval --load-config $run/config.yml --output-path $results/metrics.json --render-output-path $results/pictures

echo "== 4/4 Rendering an orbit"
python scripts/make_orbit.py --load-config $run/config.yml --output $results/orbit.json
ns-render camera-path --load-config $run/config.yml --camera-path-filename $results/orbit.json \
    --output-path $results/orbit64.mp4
# The frames are 64 pixels wide: enlarged to be looked at.
ffmpeg -y -loglevel error -i $results/orbit64.mp4 -vf scale=512:512:flags=neighbor -pix_fmt yuv420p $results/orbit.mp4

python - $results/metrics.json <<'PYTHON'
import json, sys
r = json.load(open(sys.argv[1]))["results"]
print(f"\nHeld-out objects: {r['num_scenes']:.0f}, images: {r['num_images']:.0f}")
print(f"PSNR {r['psnr']:.2f} dB +- {r['psnr_std']:.2f} over images (copying the nearest context view: "
      f"{r['psnr_copy_nearest']:.2f}), SSIM {r['ssim']:.3f}")
PYTHON
cat <<EOF
Video:    $results/orbit.mp4
Pictures: $results/pictures/*.png   (rows: context views, targets, predictions)
Metrics:  $results/metrics.json, of every image: $results/metrics.images.json
Look at it live: source .venv/bin/activate && ns-viewer --load-config $run/config.yml
EOF
