#!/usr/bin/env bash
# Everything a GPU has to say, the most important first, in eight minutes: in one command, or in two so that the first
# figures are read before the rest runs; and what it says of training, in four more. Needs PyTorch, Triton, pytest,
# setuptools and pybind11; fetches nothing.
#
#     bash benchmarks/gpu_runbook.sh --prepare DIR
#     bash benchmarks/gpu_runbook.sh [--dry-run] [--first | --rest | --training] [--objects DIR] [--wheels DIR] OUT
#
# --prepare, on any machine with nvcc, compiles what no Python is in: a few MB in DIR, and no GPU waits for a compiler.
# --objects links them, if they are of these sources; without it everything is compiled. --first builds, tries every
# family of kernels and times the paths, in four minutes; --rest does what is left. --training is a part by itself, of
# four minutes, which needs transformers, accelerate and datasets: FlexAttention against SDPA, steps beside TRL's on the
# preference pairs in the file DPO_KERNELS_PREFERENCES, or on the embedded ones, and one rank through NCCL. --wheels installs what lies in DIR,
# each wheel by itself and without its dependencies: pytest-xdist, the peers. --dry-run does the same on a CPU through
# Triton's interpreter at tiny sizes: small tests, and nothing of NVIDIA's.
#
# OUT gets summary.txt with a line for each step, and what each one prints: STEP.log; tables as STEP.txt and STEP.json;
# verdict/, which `dpo-kernels tune` wrote; launches.csv, what ncu measured. DPO_KERNELS_COMMIT names the commit where
# there is no repository; PYTHON is the interpreter.
set -uo pipefail

usage="usage: gpu_runbook.sh [--dry-run] [--first | --rest | --training] [--objects DIR] [--wheels DIR] OUT"
usage+=", or --prepare DIR"
device=cuda kind=cuda part=all objects= wheels= prepare= out=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) echo "$usage"; sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    --dry-run) device=cpu kind=cpu ;;
    --first | --rest | --training) part=${1#--} ;;
    --objects) objects=$(realpath "${2:?$usage}"); shift ;;
    --wheels) wheels=$(realpath "${2:?$usage}"); shift ;;
    --prepare) prepare=$(realpath -m "${2:?$usage}"); shift ;;
    -*) echo "$usage" >&2; exit 2 ;;
    *) out=$(realpath -m "$1") ;;
  esac
  shift
done
mkdir -p "${prepare:-${out:?$usage}}"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
commit=${DPO_KERNELS_COMMIT:-$(git rev-parse HEAD 2> /dev/null || cat "$objects/commit" 2> /dev/null)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

sources() {
  find setup.py csrc -type f ! -name '*.md' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
}

if [ -n "$prepare" ]; then  # setup.py has the flags; what it links here shows that the objects fit together
  DPO_KERNELS_BUILD=cuda $python setup.py build_ext -j 2 --build-temp "$scratch" --build-lib "$scratch" || exit
  find "$scratch" -name '*.o' ! -name bindings.o -exec cp {} "$prepare" \;
  sources > "$prepare/sources"
  echo "$commit" > "$prepare/commit"
  du -ch "$prepare"/*
  exit
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export DPO_KERNELS_COMMIT=$commit DPO_KERNELS_TEST_DEVICE=$device
failed=0 spare=0

# step NAME SECONDS COMMAND...: what it prints goes to NAME.log, and how it ended to the summary. One that fails or is
# stopped does not stop the others. It may take half of what those before it left of their seconds, too: all of them
# still end within the sum. SIGINT, so that Python still says what it has.
step() {
  local log=$out/$1.log start=$SECONDS result=ok took
  export name=$1 limit=$(($2 + spare / 2))
  shift 2
  [ $device = cuda ] || limit=900  # an interpreter
  echo "+ $*" > "$log"
  timeout -s INT -k 5 "$limit" bash -c 'trap "exit 130" INT; "$@"' - "$@" >> "$log" 2>&1 ||
    { result="FAILED ($?)"; failed=1; }
  took=$((SECONDS - start)) spare=$((spare - spare / 2 + limit - SECONDS + start))
  [ $spare -gt 0 ] || spare=0
  echo "$name: $result, $took s of $limit: $(tail -n 1 "$log" | cut -c 1-300)" | tee -a "$out/summary.txt"
}

install() {
  local wheel failures=()
  for wheel in "$wheels"/*.whl; do
    $python -m pip install -q --no-index --find-links "$wheels" --no-deps "$wheel" || failures+=("$(basename "$wheel")")
  done
  echo "not installed: ${failures[*]:-none}"
  [ ${#failures[@]} = 0 ]
}

build() {
  local why="no objects were given"
  if [ $part = rest ] || [ $part = training ] || [ $device = cpu ]; then  # the first part has built it, or its user
    loads && echo "it is built" && return
  fi
  if [ -n "$objects" ]; then
    why="the objects are of other sources"
    if sources | cmp -s - "$objects/sources"; then
      link && loads && echo "linked: the objects are of $(cat "$objects/commit")" && return
      why="what was linked of the objects does not load"
    fi
  fi
  extensions && loads && echo "COMPILED HERE: $why"
}

extensions() {
  DPO_KERNELS_BUILD=$kind $python setup.py build_ext -j 2 --build-temp "$scratch" --build-lib "$scratch" --inplace
}

loads() {
  $python -c "from dpo_kernels import _native$([ $kind = cpu ] || echo ', _cuda')"
}

link() {  # by setup.py as well, whose compilers find most of it done
  local cxx=${CXX:-g++}
  printf '#!/usr/bin/env bash\ncompiler %q "$@"\n' "$(command -v nvcc)" > "$scratch/nvcc"
  printf '#!/usr/bin/env bash\ncompiler %q "$@"\n' "$(command -v "${cxx%% *}")" > "$scratch/c++"
  chmod +x "$scratch/nvcc" "$scratch/c++"
  PATH=$scratch:$PATH CXX=$scratch/c++ extensions
}

compiler() {  # REAL ARGUMENTS...
  local each last= source= target=
  for each; do
    case $last in -c) source=$each ;; -o) target=$each ;; esac
    last=$each
  done
  cp "$objects/$(basename "${source%.*}").o" "$target" 2> /dev/null || "$@"
}

tune() {
  rm -rf "$out/verdict"
  DPO_KERNELS_CACHE=$out/verdict $python -m dpo_kernels tune $head || return
  echo "one head in $SECONDS s, of 60; refused: $(sed -n 's/^refused: \([^:]*\) at .*/\1/p' "$out/tune.log" | paste -sd ,)"
  [ $device = cpu ] || [ $SECONDS -le 60 ]
}

timings() {  # ARGUMENTS...: a call that hangs must leave time for what comes after it
  $gpu --json "$out/$name.json" --patience 30 --seconds $((limit - 20)) "$@" > "$out/$name.txt"
}

launches() {
  local once="$gpu --once --impl triton cuda --seconds $((limit - 10))" tensor error status
  local metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  [ $device = cuda ] || { $once; return; }
  command -v ncu || { echo "there is no ncu here"; return 1; }
  for tensor in $(ncu --query-metrics | grep -oE '^sm__pipe_tensor\w*cycles_active\b'); do  # each generation has its own
    metrics+=,$tensor.avg.pct_of_peak_sustained_elapsed
  done
  ncu --profile-from-start off --clock-control none --metrics "$metrics" --csv --page raw \
    --log-file "$out/launches.csv" $once
  status=$? error=$(grep -h '==ERROR==' "$out"/launches.{csv,log} | head -n 1)  # it is not always permitted
  echo "${error:-$(($(grep -c '^"' "$out/launches.csv") - 2)) launches}"  # names and units are lines, too
  [ -z "$error" ] && return $status
}
training() {  # with the kernels that `tune` has found best
  DPO_KERNELS_CACHE=$out/verdict $python benchmarks/train_step.py --device $device --mixed-precision bf16 \
    --dataset "${DPO_KERNELS_PREFERENCES:-demo}" --reference precompute --json "$out/$name.json" $steps \
    --contenders TRL dpo_kernels "dpo_kernels, each prompt once" > "$out/$name.txt"
}

export -f sources install build extensions loads link compiler tune timings launches training
export python device kind part objects wheels scratch out

small="rows_of or fused_forward or in_place"
kernels="tests/impl/test_triton.py tests/impl/test_cuda.py"
grids="tests/impl/test_pairs.py $(printf "tests/test_%s.py " logps linear_dpo memory numerics ops)"
pytest="$python -m pytest -v -p no:cacheprovider"  # -v: the last line of what was stopped is where it hung
if [ $device = cuda ]; then
  export head="--device cuda --hidden 4096 --vocab 128256 --dtype bfloat16 --patience 30" gpu="$python benchmarks/gpu.py"
  few=() others=() quick=() small_rows=()
  export steps="--hidden 2048 --layers 4 --heads 16 --pairs 8 --max-length 1024 --steps 5 --warmup 3"
else
  export head="--device cpu --hidden 32 --vocab 256 --dtype float32"
  few=(-k "$small") others=(-q --collect-only) quick=(--impl torch) small_rows=(--pairs 2 --longest 48)
  export steps="--quick --impl torch --no-memory"
  # of bf16 the interpreter makes something else: corrected in every process that starts
  mkdir "$scratch/site"
  printf 'import interpreter\n\ninterpreter.correct()\n' > "$scratch/site/sitecustomize.py"
  # what torch.compile makes takes minutes to make, and is not of a GPU
  gpu="env TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1 PYTHONPATH=$scratch/site:$PWD/tests/helpers:$PYTHONPATH"
  export gpu="$gpu $python benchmarks/gpu.py --device cpu --quick --peers eager --impl torch triton"
fi

[ $part = rest ] || [ $part = training ] || rm -f "$out/summary.txt"
echo "${commit:-unknown commit}, $device, $part" | tee -a "$out/summary.txt"

# The limits add up to 480 seconds, up to the end of the first part to 240; those of training, by itself, to 240.
[ -z "$wheels" ] || step wheels 15 install
step build 60 build
step environment 15 $python -m dpo_kernels env
if [ $part = training ]; then
  step attention 50 $python benchmarks/attention.py --device $device "${small_rows[@]}"
  step training 70 training
  step one_rank 30 $python -m torch.distributed.run --standalone --nproc_per_node 1 benchmarks/one_rank.py --device $device
  exit $failed
fi
if [ $part != rest ]; then
  step tune 75 tune
  step paths 60 timings --only paths,E "${quick[@]}"
  [ $device = cpu ] || step gradients 15 $python benchmarks/gradients.py --seconds 10 --json "$out/gradients.json"
fi
[ $part != first ] || exit $failed
parallel=()  # Triton compiles for longer than the tests run
if [ $device = cuda ] && $python -c "import xdist" 2> /dev/null; then parallel=(-n 8); fi
step triton 40 $pytest "${parallel[@]}" "${few[@]}" tests/impl/test_triton.py
step cuda 30 $pytest "${parallel[@]}" "${few[@]}" tests/impl/test_cuda.py
step tuning 20 $pytest "${parallel[@]}" "${others[@]}" tests/tuning
step grids 30 $pytest "${parallel[@]}" "${others[@]}" $grids
step tiles 25 timings --only tiles "${quick[@]}"
step launches 35 launches
step peers 20 timings --only peers,sizes,memory,masks,flat "${quick[@]}"
[ $device = cuda ] || exit $failed
for tool in memcheck racecheck; do
  # PyTorch's caching allocator would hide what lies beyond a tensor
  step $tool 20 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
    $pytest $kernels -k "$small"
done
exit $failed
