#!/bin/bash
# The GPU benchmark: tedfx and the peers that are installed, in turn, on the GPUs of this machine.
#   bash benchmarks/run_gpu.sh [SECONDS]        writes benchmarks/results/gpu-<GPUs>.jsonl and docs/performance.md
# Runs that would begin after SECONDS (default 520) are left out, and the table says so by leaving them out too.
cd "$(dirname "$0")/.." || exit 1
limit=${1:-520}
gpus=$(nvidia-smi -L | wc -l)
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | grep -o "[A-Z]*[0-9]*" | grep -m1 "[0-9]")
mkdir -p "${OUT:=benchmarks/results}"
rows=$OUT/gpu-${gpus}x$name.jsonl
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
: > "$rows"
run() { # GPUs, script, arguments: its JSON line, or what it ended with
  n=$1 script=$2; shift 2
  [ $SECONDS -gt "$limit" ] && return
  timeout 140 torchrun --nproc-per-node "$n" benchmarks/$script "$@" > "$OUT/last.txt" 2> "$OUT/last.err" ||
    echo "$script $*: $(tail -1 "$OUT/last.err")" >&2
  grep "^{" "$OUT/last.txt" | tee -a "$rows" | cut -c1-160
}
one() { for work in mixtral fine; do
  run 1 gpu.py --work $work --compile --profile
  run 1 peers/transformers_run.py --work $work --compile
done; run 1 peers/transformers_run.py --work dense --compile; }
two() { for work in mixtral fine; do
  run 2 gpu.py --work $work --mesh ep=2 --compile --profile
  run 2 gpu.py --work $work --mesh dp=2 --zero 1 --states fp32 --compile --profile
  run 2 gpu.py --work $work --mesh ep=2 --zero 1 --states fp32 --compile --profile
  run 2 peers/transformers_run.py --work $work --mode fsdp2 --compile
done
  run 2 gpu.py --mesh tp=2 --compile --profile
  run 2 gpu.py --mesh tp=2 --sequence-parallel 0 --compile --profile
  run 2 gpu.py --mesh tp=2 --roles expert=tp --compile --profile; }
[ "$gpus" = 1 ] && one || two
python3 benchmarks/gpu_table.py --out docs/performance.md
