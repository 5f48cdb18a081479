#!/usr/bin/env bash
# Make the run of a GPU that is to ship in report/reference/, and look through what only a GPU can show.
#
#   benchmarks/on_a_gpu.sh                        # on a machine with CUDA, after `make install`; some minutes
#   DEVICE=cpu LIMIT=600 benchmarks/on_a_gpu.sh   # the same steps without a GPU, to try them
#
# Leaves in OUT (on-a-gpu/): tests.txt, the report of both devices, and reference/precise-<device>, the run without what
# nobody reads: move that folder to report/reference/.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=${OUT:-on-a-gpu}
bin=${BIN:-.venv/bin}
mkdir -p "$out"

echo "tests that need a GPU (skipped without one)"
"$bin/python" -m pytest -q -rs -k "cuda or gpu or graph" -m "not slow" tests | tee "$out/tests.txt"

echo "both devices, with everything that is measured"
devices=(--device cpu)
[ "$device" = cpu ] || devices+=(--device "$device")
few=(--data photos)
[ -z "${LIMIT:-}" ] || few+=(--limit "$LIMIT" --seconds 0 --epochs 30)
"$bin/transformnet" report "${devices[@]}" "${few[@]}" --runs-dir "$out/runs" --out "$out/report"

name=precise-$device
rm -rf "$out/reference"
mkdir "$out/reference"
cp -r "$out/runs/$name" "$out/reference/$name"
find "$out/reference" \( -name '*.ipynb' -o -name 'checkpoint.safetensors' -o -name 'images.safetensors' \) -delete
find "$out/reference" -name tensorboard -prune -exec rm -r {} +
"$bin/transformnet" report --run "$out/reference/$name" --out "$out/check"  # it can be read
echo "ready: move $out/reference/$name to report/reference/"
