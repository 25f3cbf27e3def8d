#!/bin/bash
# The paper's pipeline for one size without NeMo-Run, each job waiting for the one before to end well:
#   slurm/pipeline.sh 8b grpo --account=my_account --partition=batch --time=04:00:00
# Overrides of a stage are given by running its line of this script alone.
set -euo pipefail
size=$1 algorithm=$2
shift 2
after=()
for stage in sft collect warmup align "rlvr_$algorithm"; do
  recipe=$(python -c "from recipes.qwen3_vl import recipe_name; print(recipe_name('$stage', '$size'))")
  nodes=${recipe##*_vl_"$size"_}
  job=$(sbatch --parsable --job-name="prism.$stage" --nodes="${nodes%%n*}" "${after[@]}" "$@" \
    slurm/train.sbatch "runs/$size/$stage" "$recipe")
  echo "$stage: job $job, $recipe"
  after=(--dependency="afterok:$job")
done
