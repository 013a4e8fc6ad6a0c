#!/usr/bin/env bash
# Everything a GPU has to say, in one command and under ten minutes: build, the kernels' tests on the device, timings
# beside the bare products and the peers, and compute-sanitizer over the small tests. Needs PyTorch, Triton, pytest,
# setuptools and pybind11; fetches nothing.
#
#     bash benchmarks/gpu_runbook.sh [--dry-run] [--wheels DIR] OUT
#
# --wheels installs what lies in DIR, each wheel by itself and without its dependencies: the peers. --dry-run does the
# same on a CPU through Triton's interpreter, with the small tests and tiny sizes, and without compute-sanitizer.
#
# OUT gets summary.txt with a line for each step, tables.txt, timings.json, and what the steps print: setup.log,
# tests.log, timings.log, sanitizer.log. DPO_KERNELS_COMMIT names the commit where there is no repository; PYTHON is
# the interpreter.
set -uo pipefail

usage="usage: gpu_runbook.sh [--dry-run] [--wheels DIR] OUT"
device=cuda build=cuda wheels= out=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) echo "$usage"; sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    --dry-run) device=cpu build=cpu ;;
    --wheels) wheels=$(realpath "${2:?$usage}"); shift ;;
    -*) echo "$usage" >&2; exit 2 ;;
    *) out=$(realpath -m "$1") ;;
  esac
  shift
done
mkdir -p "${out:?$usage}"
cd "$(dirname "$0")/.."
rm -f "$out"/{summary,tables}.txt "$out"/{setup,tests,timings,sanitizer}.log "$out/timings.json"
python=${PYTHON:-python3}
commit=${DPO_KERNELS_COMMIT:-$(git rev-parse HEAD 2> /dev/null)}
export DPO_KERNELS_COMMIT=$commit DPO_KERNELS_TEST_DEVICE=$device
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0

# step LOG NAME SECONDS COMMAND...: what it prints goes to LOG.log; a step that fails or is stopped does not stop the
# others. SIGINT, so that Python still says what it has.
step() {
  local log=$out/$1.log name=$2 seconds=$3 start=$SECONDS result=ok
  shift 3
  echo "+ $*" >> "$log"
  timeout -s INT -k 5 "$seconds" "$@" >> "$log" 2>&1 || { result="FAILED ($?)"; failed=1; }
  echo "$name: $result, $((SECONDS - start)) s: $(tail -n 1 "$log" | cut -c 1-300)" | tee -a "$out/summary.txt"
}

install() {
  local wheel failures=()
  for wheel in "$1"/*.whl; do
    $python -m pip install -q --no-index --find-links "$1" --no-deps "$wheel" || failures+=("$(basename "$wheel")")
  done
  echo "not installed: ${failures[*]:-none}"
  [ ${#failures[@]} = 0 ]
}

timings() {
  $python benchmarks/gpu.py --device "$device" --json "$out/timings.json" "$@" > "$out/tables.txt"
}
export -f install timings
export python device out

tests="tests/impl/test_triton.py tests/impl/test_cuda.py"
small="rows_of or fused_forward or in_place"
echo "${commit:-unknown commit}, $device" | tee "$out/summary.txt"

# The limits add up to 580 seconds.
[ -z "$wheels" ] || step setup wheels 30 bash -c 'install "$1"' - "$wheels"
step setup build 90 env DPO_KERNELS_BUILD=$build $python setup.py build_ext --inplace
step setup environment 20 $python -m dpo_kernels env
if [ $device = cpu ]; then
  step tests tests 600 $python -m pytest -q -p no:cacheprovider $tests -k "$small"
  # of bf16 the interpreter makes something else: corrected in every process that starts
  mkdir -p "$out/site"
  printf 'import interpreter\n\ninterpreter.correct()\n' > "$out/site/sitecustomize.py"
  export TRITON_INTERPRET=1 PYTHONPATH=$out/site:$PWD/tests/helpers:$PYTHONPATH
  step timings timings 300 bash -c 'timings "$@"' - --quick --only paths,E --peers eager
  exit $failed
fi
pytest="$python -m pytest -q -p no:cacheprovider"
$python -c "import xdist" 2> /dev/null && parallel="-n 8"  # Triton compiles for longer than the tests run
step tests kernels 60 $pytest ${parallel:-} --full $tests
step timings timings 240 bash -c 'timings "$@"' - --seconds 220
step tests grid 60 $pytest ${parallel:-} $(printf "tests/test_%s.py " logps linear_dpo memory numerics ops)
for tool in memcheck racecheck; do
  # PyTorch's caching allocator would hide what lies beyond a tensor
  step sanitizer $tool 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
    $pytest $tests -k "$small"
done
exit $failed
