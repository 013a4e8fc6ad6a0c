#!/usr/bin/env bash
# Everything a CPU has to say, in one command and under an hour on two cores: tables and charts beside every peer that
# is installed, growth with tokens and vocabulary, and whole training steps on DATASET (default: the embedded demo).
# Nothing else should run beside it.
#
#     bash benchmarks/cpu_report.sh OUT [DATASET]
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
usage="usage: cpu_report.sh OUT [DATASET]"
case ${1:-} in
  -h | --help) echo "$usage"; sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
  -*) echo "$usage" >&2; exit 2 ;;
esac
out=${1:?$usage}
dataset=$([ $# -lt 2 ] && echo demo || realpath "$2")
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
cd "$out"

# Ends with another status than 0 where one of ours is missing, wrong, or does not scale; the rest is measured all the same.
failed=0
measure() {
  local name=$1
  shift
  echo "$(date +%T) $name"
  "$@" > "$name.txt" || { failed=1; echo "$name: FAILED"; }
}

bench="$python -m dpo_kernels bench --model HuggingFaceTB/SmolLM2-135M"
measure float32 $bench --mode forward train logits --mask all real --tokens 512 --max-length 512 --rounds 5 --seconds 60 \
  --json float32.json --csv float32.csv --plot float32
# Where others do best
measure bfloat16 $bench --mode forward train --dtype bfloat16 --tokens 64 512 --seconds 60 \
  --json bfloat16.json --csv bfloat16.csv --plot bfloat16
measure scaling $python "$root/benchmarks/scaling.py" scaling --impl cpu
measure train_step $python "$root/benchmarks/train_step.py" --dataset "$dataset" --steps 5 --warmup 1 --json train_step.json
echo "$(date +%T) done"
exit $failed
