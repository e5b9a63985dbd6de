#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 590 s: the tests on the GPU, the benchmarks, the tables.
#
#     benchmarks/gpu_all.sh [FOLDER]        FOLDER (runs/gpu) receives the logs, the numbers and the written pages
#
# FOLDER.tar holds all of it in one file, and is written again after each stage.  A borrowed machine may be taken away
# early, or give only a few files back.
#
# PYTHON names the interpreter (.venv's, else python3). It needs CuPy, pytest, hypothesis and, for the rivals, PyTorch.
# Each stage has a time limit.  If one fails, the others still run; the end names it, and the exit status is 1.
set -uo pipefail
if [ $# -gt 1 ] || [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
folder=$(realpath -m "${1:-runs/gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
mkdir -p "$folder" && rm -f "$folder.tar" "$folder.tar.part" "$folder"/{convolution,attention,norms,train_step}.json "$folder"/checks.txt || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

pack() {
    tar -C "$folder" -cf "$folder.tar.part" . && mv "$folder.tar.part" "$folder.tar"
}

# stage NAME SECONDS COMMAND...
stage() {
    local name=$1 limit=$2 began=$SECONDS status result
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$folder/${name// /_}.log" 2>&1
    status=$?
    case $status in
        0) result=passed ;;
        124 | 137) result="not done after $limit s" ;;
        *) result=failed ;;
    esac
    [ $status = 0 ] || failed+=("$name ($result)")
    tail -n "$([ $status = 0 ] && echo 4 || echo 12)" "$folder/${name// /_}.log"
    printf '%s\t%s\t%d\n' "$name" "$result" $((SECONDS - began)) >>"$folder/checks.txt"
    pack
}

workers() {                                                 # most of a test's time is compilation
    "$python" -c 'import xdist' 2>/dev/null && echo "-n $(($(nproc) < 8 ? $(nproc) : 8))"
}

# stops a stage with one sentence where there is no GPU
needs_gpu='
import sys
from minidiff.engine.backend import check_device
from minidiff.errors import UserError
try:
    check_device("cuda")
except UserError as error:
    sys.exit(str(error))
'
card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1 | sed "s/, /, driver /")
echo "${card:-nvidia-smi finds no GPU}, $(date -u +%F)" | tee "$folder/checks.txt"

stage card 20 "$python" -c "$needs_gpu
sys.path.insert(0, 'benchmarks')
import kernels
for name, value in kernels.machine(kernels.torch_or_none()).items():
    print(f'{name:16}{value}')"

tests="$needs_gpu
import pytest
sys.exit(pytest.main(sys.argv[1:]))"
export MINIDIFF_TEST_DEVICE=cuda
# shellcheck disable=SC2046
stage "second device" 50 "$python" -c "$tests" $(workers) tests/*/test_second_device*.py
# shellcheck disable=SC2046
stage kernels 90 "$python" -c "$tests" $(workers) tests/kernels
unset MINIDIFF_TEST_DEVICE

kernels() {
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$python" benchmarks/kernels.py --only "$@" --seconds $((limit - 12)) --json "$folder/$name.json"
}
kernels convolution 110 conv
kernels attention 110 attention
kernels norms 40 group_norm layer_norm
stage "training step" 110 "$python" benchmarks/train_step.py --device cuda --rounds 4 --json "$folder/train_step.json"

tables() {
    shopt -s nullglob
    local reports=("$folder"/*.json)
    if [ ${#reports[@]} = 0 ]; then
        echo "no stage left numbers: no table is written"
        return 1
    fi
    timeout 10 "$python" benchmarks/kernels.py --tables "${reports[@]}" "$folder/checks.txt" &&
        cp kernels/README.md "$folder/kernels_README.md" && cp docs/gpu.md "$folder/docs_gpu.md"
}
echo "== tables"
tables || failed+=(tables)
pack

echo "== done after $SECONDS s; logs and numbers are in $folder, and in $folder.tar"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
