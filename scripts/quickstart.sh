#!/usr/bin/env bash
# From nothing to rendered new views of unseen objects, on a CPU: installs, renders held-out objects, evaluates the model
# that comes with this package on them and renders an orbit. Whatever is there already is reused.
#
#   bash scripts/quickstart.sh            # about a minute and a half after the installation
#   bash scripts/quickstart.sh --train    # trains a model of that kind from scratch instead, for some minutes
set -euo pipefail
if [ $# -gt 1 ] || [ "${1:---train}" != --train ]; then
    echo "quickstart.sh: found $*; expected nothing, or --train" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
bash scripts/setup.sh objects
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore

method=efficient-lvsm-plus-tiny
scene=scopia-armchair2
objects=(--resolution 64 --views-per-object 24)

if [ $# = 0 ]; then
    data=data/objects64_test
    name=quickstart
    weights=assets/$method.safetensors
    run=outputs/$name/$method/run

    echo "== 1/4 Held-out objects: $data"
    elvsm data objects --output $data "${objects[@]}" --splits test

    if [ $run/config.yml -nt $weights ]; then
        echo "== 2/4 A run of $weights: reusing $run"
    else
        echo "== 2/4 A run of $weights"
        rm -rf $run
        elvsm run --weights pretrained --data $data --scene $scene --name $name
    fi
else
    data=data/objects64
    name=quickstart-train
    steps=1000
    run=outputs/$name/$method/run
    checkpoints=$run/nerfstudio_models

    echo "== 1/4 Objects: $data"
    elvsm data objects --output $data "${objects[@]}"

    if [ -f $checkpoints/step-$(printf '%09d' $((steps - 1))).ckpt ]; then
        echo "== 2/4 Training: reusing $run"
    else
        resume=()
        if compgen -G "$checkpoints/step-*.ckpt" >/dev/null; then resume=(--load-dir $checkpoints); fi
        echo "== 2/4 Training $method, $steps steps ${resume[*]}"
        ns-train $method --data $data --output-dir outputs --experiment-name $name --timestamp run \
            --machine.device-type cpu --vis tensorboard --max-num-iterations $steps --logging.steps-per-log 100 \
            --steps-per-save 100 --pipeline.datamanager.scene $scene "${resume[@]}"
    fi
fi
results=outputs/$name/results

echo "== 3/4 Evaluating held-out objects"
ns-eval --load-config $run/config.yml --output-path $results/metrics.json --render-output-path $results/pictures

echo "== 4/4 Rendering an orbit of $scene, an object that no training saw"
elvsm orbit --load-config $run/config.yml --output $results/orbit.json
ns-render camera-path --load-config $run/config.yml --camera-path-filename $results/orbit.json \
    --output-path $results/orbit64.mp4
# The frames are 64 pixels wide: enlarged to be looked at.
ffmpeg -y -loglevel error -i $results/orbit64.mp4 -vf scale=512:512:flags=neighbor -pix_fmt yuv420p $results/orbit.mp4

python - $results/metrics.json <<'PYTHON'
import json, sys
r = json.load(open(sys.argv[1]))["results"]
print(f"\nHeld-out objects: {r['num_scenes']:.0f}, images: {r['num_images']:.0f}, 4 context views each")
print(f"PSNR {r['psnr']:.2f} dB +- {r['psnr_std']:.2f} over images (copying the nearest context view: "
      f"{r['psnr_copy_nearest']:.2f}), SSIM {r['ssim']:.3f}")
PYTHON
cat <<END
Video:    $results/orbit.mp4
Pictures: $results/pictures/*.png   (rows: context views, targets, predictions)
Metrics:  $results/metrics.json, of every image: $results/metrics.images.json
Look at it live: source .venv/bin/activate && ns-viewer --load-config $run/config.yml
Your photos:     source .venv/bin/activate && elvsm run --weights pretrained --data YOUR_CAPTURE
END
