#!/usr/bin/env bash
# Everything that needs a GPU, in parts, those worth most first. Each part has a time limit of its own and writes its
# results as it goes. The same command again skips what is done, and goes on with what is not.
#
#   bash benchmarks/on_gpu.sh [--out DIR] [PART...]     on a machine with CUDA (default: all parts, as below)
#   bash benchmarks/on_gpu.sh --rehearse [PART...]      every part at a tiny size on the CPU, into a temporary folder
#
#   A = tests mnist nan       the tests marked `cuda`; MNIST at batch 8 by the command line; a NaN, halted
#   B = norm norm-compiled    the layer beside nn.BatchNorm and a copy
#   C = steps cifar steps-compiled    resnet9 on CIFAR-10: steps a second at 2, 8, 32, plain and as CUDA graphs; time to
#                             accuracy at 512; compiled steps
#   D = callbacks             what callbacks cost
#   E = mnist-graph small     MNIST as in A, and whole trainings on CIFAR-10 at batch 8 and 2, their steps as CUDA graphs
#
# DIR: logs, tables, pictures (default: benchmarks/results/cuda). FASTRBN_DATA: MNIST and CIFAR-10 (default: .data; what
# .data/packed has is unpacked there first). PYTHON: the interpreter (default: python3). LIMITS="tests=60 cifar=300":
# other limits, in seconds. Status 1: a part failed or ran out of time, and is named at the end.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=$PWD/benchmarks/results/cuda rehearse=
while [ $# -gt 0 ]; do
    case $1 in
    --rehearse) rehearse=$(mktemp -d) && out=$rehearse ;;
    --out) out=$(realpath -m "${2:?--out needs a folder}") && shift ;;
    *) break ;;
    esac
    shift
done
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 # not installed is fine

declare -A parts=([A]="tests mnist nan" [B]="norm norm-compiled" [C]="steps cifar steps-compiled" [D]=callbacks [E]="mnist-graph small")
declare -A limit=([tests]=110 [mnist]=50 [nan]=20 [norm]=120 [norm-compiled]=60 [steps]=45 [cifar]=135
    [steps-compiled]=60 [callbacks]=60 [mnist-graph]=40 [small]=150)
[ -z "$rehearse" ] || for name in "${!limit[@]}"; do limit[$name]=120; done
for pair in ${LIMITS:-}; do limit[${pair%%=*}]=${pair#*=}; done
todo=()
for name in "${@:-A B C D E}"; do
    for name in $name; do todo+=(${parts[$name]:-$name}); done
done
for name in "${todo[@]}"; do
    [ -n "${limit[$name]:-}" ] || { echo "no part is called $name: ${!parts[*]} ${!limit[*]}" >&2 && exit 2; }
done

export FASTRBN_DATA=${FASTRBN_DATA:-$PWD/.data}
[ ! -f .data/packed/unpack.sh ] || bash .data/packed/unpack.sh "$FASTRBN_DATA" || exit
images() { # whether this data set is here
    compgen -G "$FASTRBN_DATA/$1" >/dev/null || { echo "== $name: skipped, $FASTRBN_DATA has no $1" && false; }
}

unfinished=()
part() { # STATUS COMMAND...: runs it under the part's limit, its output to the terminal and to DIR/NAME.log
    local expected=$1 start=$SECONDS status word
    shift
    if grep -qs "^== $name: done" "$out/$name.log"; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*" | tee -a "$out/$name.log"
    timeout --signal=INT --kill-after=15 "${limit[$name]}" "$@" 2>&1 | tee -a "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
    "$expected") word=done ;;
    124 | 137) word="out of time" ;;
    *) word="FAILED, status $status" ;;
    esac
    [ "$word" = done ] || unfinished+=("$name ($word)")
    echo "== $name: $word, $((SECONDS - start)) s" | tee -a "$out/$name.log"
}

if [ -n "$rehearse" ]; then
    device=cpu
    tests=(-n 2) mnist=(glyphs --limit 400 --cb ParamMagnitudes) nan=(glyphs --limit 400)
    norm=(--shapes 2x8x4x4 8x8 --rounds 1 --block 0.001) compiled=(--shapes 2x8x4x4 --formats contiguous --dtype float32 --rounds 1 --block 0.001)
    tiny=(--norms running --width 8 --rounds 1 --steps 1) cifar=(--limit 128 --bs 64 --norms running --epochs 1 --compile "" --width 8)
    steps_bs=2 small=(--limit 64 --bs 8 --norms running --epochs 1 --compile "" --width 8) callbacks=(--rounds 1 --steps 8 --bs 2)
    interpreter=1
    "$python" -c 'import numpy, sys, triton
old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
sys.exit(old and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))' ||
        { interpreter=0 && echo "== rehearsal: without Triton's interpreter, which this NumPy breaks or which is not installed"; }
    echo "== rehearsal: skipped without CUDA: the tests' bodies, captured graphs, bfloat16 on the device, nn.BatchNorm without cuDNN"
else
    device=cuda interpreter=0
    "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit
    tests=(-n 12 --dist worksteal) mnist=(mnist --cb ParamMagnitudes) nan=(mnist)
    shapes=(--shapes 32x64x14x14 64x64x32x32 512x64x32x32 128x256x14x14 2x8x14x14)
    norm=("${shapes[@]}" --rounds 7 --block 0.02) compiled=("${shapes[@]}" --rounds 7 --block 0.02 --dtype float32 bfloat16)
    tiny=() cifar=(--bs 512 --epochs 12,24) steps_bs=2,8,32
    small=(--bs 8,2 --epochs 4 --compile graph) callbacks=(--rounds 7 --steps 100)
fi
fastrbn=("$python" -m fastrbn train) layer=(--layer conv_rbn --bs 8 --device "$device" --force)

for name in "${todo[@]}"; do
    case $name in
    tests) # these files alone: to collect the rest takes longer than to run them
        part 0 "$python" -m pytest -v -m cuda --durations=10 "${tests[@]}" $(grep -rl 'mark\.cuda' tests --include='test_*.py') ;;
    mnist | mnist-graph)
        [ -n "$rehearse" ] || images MNIST || continue
        graph=()
        [ "$name" = mnist ] || graph=(--cb CUDAGraph)
        part 0 "${fastrbn[@]}" "${mnist[@]}" "${graph[@]}" "${layer[@]}" --out "$out/$name" ;;
    nan)
        [ -n "$rehearse" ] || images MNIST || continue
        part 3 "${fastrbn[@]}" "${nan[@]}" "${layer[@]}" --lr 1e30 --out "$out/nan" ;;
    norm)
        TRITON_INTERPRET=$interpreter part 0 "$python" benchmarks/norm.py --device "$device" "${norm[@]}" --capture --resume \
            --dtype float32 bfloat16 --csv "$out/norm_cuda.csv" --plot "$out/norm_cuda.png" ;;
    norm-compiled)
        part 0 "$python" benchmarks/norm.py --device "$device" "${compiled[@]}" --compile --layers compiled --resume \
            --csv "$out/norm_compiled_cuda.csv" ;;
    steps | steps-compiled)
        images 'cifar*10*' || continue
        ways=plain,graph
        [ "$name" = steps ] || ways=compiled,reduce-overhead
        part 0 "$python" benchmarks/cifar.py --device "$device" --skip trainings --bs "$steps_bs" --norms running,batch \
            --ways "$ways" "${tiny[@]}" --out "$out" ;;
    cifar | small)
        images 'cifar*10*' || continue
        declare -n options=$name
        part 0 "$python" benchmarks/cifar.py --device "$device" --skip steps --norms running,batch "${options[@]}" --out "$out" ;;
    callbacks) part 0 "$python" benchmarks/callbacks.py --device "$device" "${callbacks[@]}" --resume --csv "$out/callbacks_cuda.csv" ;;
    esac
done
[ -z "$rehearse" ] || rm -rf "$rehearse"
[ ${#unfinished[@]} -eq 0 ] || { printf '== %s\n' "${unfinished[@]}" && exit 1; }
