# Environment of every rank, to be sourced by the batch script. A value that is set already is kept.
# Reasons are beside each variable; none but the last group was verified on GPUs.

# NCCL
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                    # says which link failed, and nothing else
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}            # 17 s: a congested or flapping InfiniBand port is waited for
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-13}        # as many retries before a queue pair is given up
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}           # NVLink SHARP takes GPU memory for each of Megatron's groups
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}  # frees memory as soon as a collective is done
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a hang ends the rank, so that the job can restart
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}            # and leaves what every rank was waiting for
# On RoCE or with several fabrics, set NCCL_IB_HCA and NCCL_SOCKET_IFNAME in the cluster file: only its owner knows them.

# Megatron and Transformer Engine
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # tensor parallelism overlaps only in launch order
export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}  # leaves multiprocessors to NCCL's kernels
export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}

# vLLM
export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}     # compute nodes have no way out, and should not try
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}               # a thousand ranks must not ask the hub: checkpoints are local

# pyxis and enroot
export MELLANOX_VISIBLE_DEVICES=${MELLANOX_VISIBLE_DEVICES:-all}  # enroot shows InfiniBand devices to the container

# Python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}             # each rank would take every core
export PYTHONFAULTHANDLER=1                              # a segmentation fault has a traceback
export PYTHONUNBUFFERED=1                                # the last line before a crash is in the log
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}          # libraries warn each other, a thousandfold
