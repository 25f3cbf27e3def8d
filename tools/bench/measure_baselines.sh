#!/bin/bash
# Measure tools/bench/baselines again on this machine and write the READMEs' tables from them.
# Takes about 20 minutes on two idle cores. Commit first: each JSON names the commit it was measured on.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python
out=runs/baselines # a file in tools/bench/baselines would be a change that is not committed
mkdir -p "$out"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=. PYTHONWARNINGS=ignore

logged() { # NAME COMMAND...: write the command's output to a log
  echo "== $1"
  "${@:2}" >"$out/$1.log" 2>&1 || { tail "$out/$1.log"; exit 1; }
}
tool() { logged "$1" "$python" -m "tools.bench.$2" --out "$out/$1.json" "${@:3}"; } # NAME TOOL ARGUMENTS...
mock() { tool "train_$1" train --images mock "${@:2}"; }
wide() { mock "$1" --size mid --resolutions 128x128 --response-tokens 160 --steps 8 "${@:2}"; }

tool discriminator discriminator
tool discriminator_small_images discriminator --image-scale 1
tool rollout rollout
tool sync_small sync
tool sync_medium sync --hidden 1024 --layers 12
tool sync_large sync --hidden 1536 --layers 16
logged sync_tensor_parallel "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m tools.bench.sync \
  --out "$out/sync_tensor_parallel.json" --hidden 1024 --layers 12
[ ! -d runs/quickstart ] || tool pipeline pipeline runs/quickstart
logged profile "$python" -m tools.bench.profile --out "$out/profile"
cp "$out/profile/costs.json" "$out/profile.json"
tool train train --vs hf
tool train_align train --recipe tiny_align --steps 8
tool train_rlvr train --recipe tiny_rlvr --steps 8
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
tool collectives collectives --ranks 2
tool memory memory
cp "$out"/*.json tools/bench/baselines/
"$python" -m tools.bench.tables
