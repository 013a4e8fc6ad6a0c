#!/usr/bin/env bash
# Everything a CPU has to say, in one command and about an hour on two cores: tables and charts beside every peer that
# is installed, growth with tokens and vocabulary, and whole training steps on DATASET (default: the embedded demo).
# Nothing else should run beside it.
#
#     bash benchmarks/cpu_report.sh OUT [DATASET]
set -euo pipefail
out=$(realpath -m "${1:?usage: cpu_report.sh OUT [DATASET]}")
dataset=$([ $# -lt 2 ] && echo demo || realpath "$2")
mkdir -p "$out"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
model=HuggingFaceTB/SmolLM2-135M

# Ends with another status than 0 where one of ours is missing, wrong, or does not scale; the rest is measured all the same.
failed=0
measure() {
  local name=$1
  shift
  echo "$(date +%T) $name"
  "$@" > "$out/$name.txt" || { failed=1; echo "$name: FAILED ($?)"; }
}

measure float32 $python -m dpo_kernels bench --model $model --mode forward train logits --mask all real --tokens 512 \
  --max-length 512 --rounds 5 --seconds 60 --json "$out/float32.json" --csv "$out/float32.csv" --plot "$out/float32"
# Where eager code in half precision, and small batches, do best
measure bfloat16 $python -m dpo_kernels bench --model $model --mode forward train --dtype bfloat16 --tokens 64 512 \
  --seconds 60 --json "$out/bfloat16.json" --csv "$out/bfloat16.csv" --plot "$out/bfloat16"
measure scaling $python benchmarks/scaling.py "$out/scaling" --impl cpu
measure train_step $python benchmarks/train_step.py --dataset "$dataset" --steps 5 --warmup 1 --json "$out/train_step.json"
echo "$(date +%T) done"
exit $failed
