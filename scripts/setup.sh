#!/usr/bin/env bash
# Makes .venv with this package and the extras named as arguments; does nothing where that was done before.
# Usage: bash scripts/setup.sh objects,dev
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-objects}

# ffmpeg: videos of ns-render. libegl1, libgl1-mesa-dri: rendering the object set without a screen.
# libgl1, libgomp1: nerfstudio's own dependencies link to them.
missing=()
for package in ffmpeg libegl1 libgl1-mesa-dri libgl1 libgomp1; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=("$package")
done
if command -v apt-get >/dev/null && [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ]; then
        echo "== Installing system packages: ${missing[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    else
        echo "Missing system packages. Install them and run this again:" >&2
        echo "    sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
elif ! command -v ffmpeg >/dev/null; then
    echo "Missing program: ffmpeg. Install it with your system's package manager and run this again." >&2
    exit 1
fi

# chromium: the test that opens the viewer in a browser, which is skipped where there is none.
if [[ ,$extras, == *,dev,* ]] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
    echo "== Installing chromium"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
        echo "No Chromium to be had: the browser test will be skipped"
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
    echo "$python is $("$python" --version 2>&1); expected Python 3.10, 3.11 or 3.12 with venv. Name another with PYTHON=..." >&2
    exit 1
fi

# The stamp says which pyproject.toml was installed last, with which extras.
stamp=.venv/.installed
wanted="$(cksum <pyproject.toml) $PWD"
if [ "$(sed -n 1p "$stamp" 2>/dev/null)" = "$wanted" ] && sed 1d "$stamp" | tr ',' '\n' | sort >"$stamp.has" &&
    [ -z "$(echo "$extras" | tr ',' '\n' | sort | comm -23 - "$stamp.has")" ]; then
    exit 0
fi
echo "== Installing elvsm-nerfstudio[$extras] into .venv"
# Programs in an environment name its folder: one that was copied or moved with the checkout would run the old code.
if [ -f "$stamp" ] && [[ "$(sed -n 1p "$stamp")" != *" $PWD" ]]; then
    "$python" -m venv --clear .venv
elif [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --editable ".[$extras]"
{
    echo "$wanted"
    echo "$extras"
} >"$stamp"
