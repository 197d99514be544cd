#!/usr/bin/env bash
# From nothing to rendered new views of unseen objects, on a CPU: installs, renders held-out objects, evaluates the model
# that comes with this package on them, renders an orbit, and fits Gaussians to what it saw and rendered. Whatever is there
# already is reused.
#
#   bash scripts/quickstart.sh            # a few minutes after the installation
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
objects=(--resolution 128 --views-per-object 24)

if [ $# = 0 ]; then
    data=data/objects128_test
    name=quickstart
    weights=assets/$method.safetensors
    run=outputs/$name/$method/run

    echo "== 1/5 Held-out objects: $data"
    elvsm data objects --output $data "${objects[@]}" --splits test

    if [ $run/config.yml -nt $weights ]; then
        echo "== 2/5 A run of $weights: reusing $run"
    else
        echo "== 2/5 A run of $weights"
        rm -rf $run
        elvsm run --weights pretrained --data $data --scene $scene --name $name
    fi
else
    data=data/objects128
    name=quickstart-train
    steps=1000
    run=outputs/$name/$method/run
    checkpoints=$run/nerfstudio_models

    echo "== 1/5 Objects: $data"
    elvsm data objects --output $data "${objects[@]}"

    if [ -f $checkpoints/step-$(printf '%09d' $((steps - 1))).ckpt ]; then
        echo "== 2/5 Training: reusing $run"
    else
        resume=()
        if compgen -G "$checkpoints/step-*.ckpt" >/dev/null; then resume=(--load-dir $checkpoints); fi
        echo "== 2/5 Training $method, $steps steps ${resume[*]}"
        ns-train $method --data $data --output-dir outputs --experiment-name $name --timestamp run \
            --machine.device-type cpu --vis tensorboard --max-num-iterations $steps --logging.steps-per-log 100 \
            --steps-per-save 100 --pipeline.datamanager.scene $scene "${resume[@]}"
    fi
fi
results=outputs/$name/results

echo "== 3/5 Evaluating held-out objects"
ns-eval --load-config $run/config.yml --output-path $results/metrics.json --render-output-path $results/pictures

echo "== 4/5 Rendering an orbit of $scene, an object that no training saw"
elvsm orbit --load-config $run/config.yml --output $results/orbit.json
ns-render camera-path --load-config $run/config.yml --camera-path-filename $results/orbit.json \
    --output-path $results/orbit_small.mp4

splats=outputs/$name/splatfacto-lvsm/run
if [ $splats/fit.json -nt $run/config.yml ]; then
    echo "== 5/5 Gaussians: reusing $splats"
else
    echo "== 5/5 Gaussians, fitted to the same photos and to views that the model renders between them"
    rm -rf $splats
    ns-train splatfacto-lvsm --data $data --output-dir outputs --experiment-name $name --timestamp run \
        --machine.device-type cpu --vis tensorboard --max-num-iterations 500 --logging.steps-per-log 100 \
        --pipeline.datamanager.scene $scene --pipeline.datamanager.image-size 64 64 --pipeline.datamanager.weights $run
fi
ns-render camera-path --load-config $splats/config.yml --camera-path-filename $results/orbit.json \
    --output-path $results/gaussians_small.mp4
# The frames are small: enlarged to be looked at.
for video in orbit gaussians; do
    ffmpeg -y -loglevel error -i $results/${video}_small.mp4 -vf scale=512:512:flags=neighbor -pix_fmt yuv420p \
        $results/$video.mp4
done

python - $results/metrics.json <<'PYTHON'
import json, sys
r = json.load(open(sys.argv[1]))["results"]
print(f"\nHeld-out objects: {r['num_scenes']:.0f}, images: {r['num_images']:.0f}, 4 context views each")
print(f"PSNR {r['psnr']:.2f} dB +- {r['psnr_std']:.2f} over images (copying the nearest context view: "
      f"{r['psnr_copy_nearest']:.2f}), SSIM {r['ssim']:.3f}")
PYTHON
cat <<END
Videos:   $results/orbit.mp4 (the network), $results/gaussians.mp4 (Gaussians, which render in real time)
Pictures: $results/pictures/*.png   (rows: context views, targets, predictions)
Metrics:  $results/metrics.json, of every image: $results/metrics.images.json
Look at it live: source .venv/bin/activate && ns-viewer --load-config $run/config.yml
Your photos:     source .venv/bin/activate && elvsm run --weights pretrained --data YOUR_CAPTURE
END
