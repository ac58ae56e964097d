#!/usr/bin/env bash
# All that is to be seen on a GPU, in one call, from the project's root:
#   bash benchmarks/gpu_check/measure.sh [--budget SECONDS] [--parts env,smoke,tests,...] [--rehearse]
# A copy of this folder's scripts does the same (`bash .gpu/measure.sh`): beside it may lie `commit`, the name of
# what is measured, `store/`, latents to train on, and `caches.tgz`, compilers' caches of the last call.
# Findings are written to $OUT (default gpu-check-output) as they are made; see docs/gpu-runner.md.
set -u
ROOT=$PWD
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -d $ROOT/meduet_fast && -d $ROOT/kernels ]] || { echo "measure.sh: run it in the project's root"; exit 2; }
export ROOT KIT=$HERE OUT=${OUT:-$ROOT/gpu-check-output} KIT_WORK=${KIT_WORK:-/tmp/gpu-check}
mkdir -p "$OUT" "$KIT_WORK"
OUT=$(cd "$OUT" && pwd) KIT_WORK=$(cd "$KIT_WORK" && pwd)
source "$HERE/lib/machine.sh"
exec python3 -m benchmarks.gpu_check.lib.parts "$@"
