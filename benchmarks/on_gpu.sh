#!/usr/bin/env bash
# Where there is a GPU, in one go: the tests, CUDA's among them, and every figure that needs one.
#
#   bash benchmarks/on_gpu.sh [OUT] [PART...]
#
# OUT: where logs, tables and pictures go (default: benchmarks/results). PART: tests, norm, callbacks, cifar (default: all,
# in this order). PYTHON: the interpreter (default: python3). MINUTES: of cifar.py, which goes on with what is left when it
# is started again (default: 9). A part that fails is named at the end, and does not stop the others.
set -u
out=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${out:-$PWD/benchmarks/results}
[ $# -gt 0 ] && shift
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # not installed is fine
mkdir -p "$out"
failed=()

part() { # NAME COMMAND...: its output to the terminal and to OUT/NAME.log
    local name=$1 start=$SECONDS
    shift
    "$@" 2>&1 | tee "$out/$name.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit
[ $# -gt 0 ] || set -- tests norm callbacks cifar
for name; do
    case $name in
    tests) part tests "$python" -m pytest -q ;;
    norm) part norm "$python" benchmarks/norm.py --csv "$out/norm_cuda.csv" --plot "$out/norm_cuda.png" ;;
    callbacks) part callbacks "$python" benchmarks/callbacks.py --device cuda --csv "$out/callbacks_cuda.csv" ;;
    cifar) part cifar "$python" benchmarks/cifar.py --minutes "${MINUTES:-9}" --out "$out" ;;
    *) echo "no part is called $name: tests, norm, callbacks, cifar" && exit 2 ;;
    esac
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" && exit 1; }
