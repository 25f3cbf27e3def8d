#!/bin/bash
# Submit the paper's pipeline for one size without NeMo-Run; each job waits for the one before to succeed:
#   slurm/pipeline.sh SIZE ALGORITHM [bf16|fp8] [sbatch's --option=value ...] [stage.key=value ...]
#   slurm/pipeline.sh 8b grpo --account=my_account --partition=batch --time=04:00:00 rlvr.run.train_iters=40
# TERM is sent GRACE_SECONDS (recipes/cluster.py) before the time limit, or --signal=TERM@SECONDS. BF16 is the default.
# Everything is under runs/PIPELINE/, as with recipes.launch.
set -euo pipefail
[ $# -ge 2 ] || { echo "error: say slurm/pipeline.sh SIZE ALGORITHM [bf16|fp8] [OPTIONS]; its head has an example" >&2; exit 2; }
size=$1 algorithm=$2 precision=bf16
shift 2
case ${1:-} in bf16 | fp8) precision=$1 && shift ;; esac
pipeline=pipeline_${algorithm}_qwen3_vl_${size}_h100_$precision
options=() overrides=()
for word in "$@"; do
  case $word in -*) options+=("$word") ;; *) overrides+=("$word") ;; esac
done
steps=$(python -m recipes.pipeline "$pipeline" "${overrides[@]}")
after=()
while IFS=$'\t' read -r -a step; do
  job=$(sbatch --parsable --job-name="prism.${step[0]}" --nodes="${step[1]}" --signal="TERM@${step[2]}" "${after[@]}" "${options[@]}" \
    slurm/train.sbatch "${step[@]:3}")
  echo "${step[0]}: job $job, ${step[4]}"
  after=(--dependency="afterok:$job")
done <<<"$steps"
