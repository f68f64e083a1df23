#!/usr/bin/env bash
# Collects what a GPU machine without a package registry lacks: wheels for Python 3.12 and Lens' own metadata.
#
#   scripts/gpu_wheels.sh [FOLDER] [LIMIT_MIB]      (default: .whl 64)
#
# That machine has torch, transformers, accelerate, peft and what they need (docs/gpu.md lists the versions). There:
#
#   pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl
#   PYTHONPATH=/tmp/site:$PWD:$PWD/plugins:$PWD/FOLDER python -m lens_core doctor
#
# Fails if what must travel is larger than LIMIT_MIB: FOLDER and the repository's tracked files, without those that the
# check does not read. Leave these behind: docs, and the weights of tiny:rl and tiny:reasoner.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
limit=${2:-64}
unread=(':!docs' ':!plugins/lens_shapes/weights/rl' ':!plugins/lens_shapes/weights/reasoner')
python=${PYTHON:-.venv/bin/python}

packages="cattrs cyclopts diffusers docstring_parser httpcore2 httpx2 importlib_metadata lazy-importer rich-rst truststore ${EXTRA_WHEELS:-}"

mkdir -p "$folder"
rm -rf "$folder"/*.whl "$folder"/*.dist-info
wanted=()
for name in $packages; do
    pin=$(grep -iE "^${name//[-_]/[-_]}==" constraints.txt || true)
    if [ -z "$pin" ]; then
        echo "gpu_wheels.sh: constraints.txt pins no $name; add it" >&2
        exit 1
    fi
    wanted+=("$pin")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -d "$folder" "${wanted[@]}"

# Plugins are found by their entry points, which are metadata: without it Lens would start with no component at all.
"$python" -c 'import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel(sys.argv[1])' \
    "$folder" >/dev/null

rm -rf "$folder"/*.egg-info
tracked=$(git ls-files -z -- . "${unread[@]}" | xargs -0 du -cb | awk '/\ttotal$/ {sum += $1} END {print sum}')
wheels=$(du -sb "$folder" | cut -f1)
total=$((tracked + wheels))
ls -l "$folder" | awk 'NR > 1 {printf "%10d  %s\n", $5, $9}'
printf 'tracked files that the check reads %.1f MiB + %s %.1f MiB = %.1f MiB of %s MiB\n' \
    "$(bc -l <<<"$tracked/1048576")" "$folder" "$(bc -l <<<"$wheels/1048576")" "$(bc -l <<<"$total/1048576")" "$limit"
if [ "$total" -gt $((limit * 1048576)) ]; then
    echo "gpu_wheels.sh: too large to travel: over $limit MiB" >&2
    exit 1
fi
