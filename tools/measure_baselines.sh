#!/bin/bash
# Measure tools/baselines anew on this machine and write the READMEs' tables from them: tools/measure_baselines.sh
# About 20 minutes on two cores with nothing else on them. Commit first: each JSON names the commit it is of.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
out=runs/baselines # a file in tools/baselines would be a change that is not committed
mkdir -p "$out"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=. PYTHONWARNINGS=ignore

kept() { # NAME COMMAND...: what the command says is kept in a log
  echo "== $1"
  "${@:2}" >"$out/$1.log" 2>&1 || { tail "$out/$1.log"; exit 1; }
}
tool() { kept "$1" "$python" "tools/$2.py" --out "$out/$1.json" "${@:3}"; } # NAME TOOL ARGUMENTS...
mock() { tool "train_$1" bench_train --images mock "${@:2}"; }
wide() { mock "$1" --size mid --resolutions 128x128 --response-tokens 160 --steps 8 "${@:2}"; }

tool discriminator bench_discriminator
tool discriminator_small_images bench_discriminator --image-scale 1
tool rollout bench_rollout
tool sync_small bench_sync
tool sync_medium bench_sync --hidden 1024 --layers 12
tool sync_large bench_sync --hidden 1536 --layers 16
kept sync_tensor_parallel "$python" -m torch.distributed.run --standalone --nproc-per-node 2 tools/bench_sync.py \
  --out "$out/sync_tensor_parallel.json" --hidden 1024 --layers 12
[ ! -d runs/quickstart ] || tool pipeline bench_pipeline runs/quickstart
kept profile "$python" tools/profile_step.py --out "$out/profile"
cp "$out/profile/costs.json" "$out/profile.json"
tool train bench_train --vs hf
tool train_align bench_train --recipe tiny_align --steps 8
tool train_rlvr bench_train --recipe tiny_rlvr --steps 8
mock calibrate_large --response-tokens 160 --steps 8 global_batch_size=32
mock calibrate_small global_batch_size=4
wide calibrate_wide global_batch_size=8
mock frozen_vision --resolutions 256x256 --steps 8 global_batch_size=16 'model.freeze=[vision,merger]'
mock long --response-tokens 480 --steps 8 global_batch_size=12
wide wide_recompute global_batch_size=8 model.recompute=true
wide wide_data_parallel --ranks 2 --vs hf global_batch_size=16
wide wide_distributed_optimizer --ranks 2 global_batch_size=16 optimizer.use_distributed_optimizer=true
wide wide_pipeline_parallel --ranks 2 global_batch_size=16 parallel.pipeline_model_parallel_size=2 \
  max_tokens_per_microbatch=512
wide wide_tensor_parallel --ranks 2 global_batch_size=8 parallel.tensor_model_parallel_size=2 \
  parallel.sequence_parallel=true
tool collectives bench_collectives --ranks 2
tool memory bench_memory
cp "$out"/*.json tools/baselines/
"$python" tools/bench_tables.py
