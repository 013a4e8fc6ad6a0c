#!/usr/bin/env bash
# Everything a GPU has to say, in one command and under ten minutes: build, every test of the kernels on the device, and
# compute-sanitizer over the small ones. Needs PyTorch, Triton, pytest and pybind11; fetches nothing.
#
#     bash benchmarks/gpu_runbook.sh OUT      # writes OUT/*.log, and OUT/summary.txt with a line for each step
#
# --dry-run does the same on the CPU through Triton's interpreter, without compute-sanitizer.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda
limit=300
if [ "${1:-}" = --dry-run ]; then
  device=cpu
  limit=1800
  shift
fi
out=${1:?"usage: gpu_runbook.sh [--dry-run] OUT"}
mkdir -p "$out"
: > "$out/summary.txt"
export DPO_KERNELS_TEST_DEVICE=$device PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

# step NAME SECONDS COMMAND...: what it prints goes to NAME.log; a step that fails does not stop the others
step() {
  local name=$1 seconds=$2 start=$SECONDS result=ok
  shift 2
  timeout "$seconds" "$@" > "$out/$name.log" 2>&1 || { result="FAILED ($?)"; failed=1; }
  echo "$name: $result, $((SECONDS - start)) s: $(tail -n 1 "$out/$name.log")" | tee -a "$out/summary.txt"
}

echo "$(git rev-parse HEAD 2> /dev/null), $device" >> "$out/summary.txt"
step build 90 env DPO_KERNELS_BUILD=cpu python setup.py build_ext --inplace
step environment 30 python -m dpo_kernels env
kernels=$(printf "tests/test_%s.py " logps linear_dpo memory numerics ops triton)
step tests $limit python -m pytest -q -p no:cacheprovider $kernels
if [ $device = cuda ]; then
  for tool in memcheck racecheck; do
    # PyTorch's caching allocator would hide what lies beyond a tensor
    step "$tool" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python -m pytest -q -p no:cacheprovider tests/test_triton.py -k "rows_of_several_blocks or fused_forward"
  done
fi
exit $failed
