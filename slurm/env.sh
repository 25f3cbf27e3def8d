# Environment of every rank, sourced by the batch script. Variables that are already set do not change.
# Each variable has its reason; only the last group was verified, and not on GPUs.

# NCCL
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                    # report failed links only
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}            # 17 s, for a congested or flapping InfiniBand port
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-13}        # retries before a queue pair fails
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}           # NVLink SHARP needs GPU memory for each of Megatron's groups
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}  # free memory when a collective is done
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # end a rank that hangs, so that the job restarts
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}            # and dump what every rank was waiting for
# On RoCE or with several fabrics, set NCCL_IB_HCA and NCCL_SOCKET_IFNAME in the cluster file: they differ by cluster.

# Megatron and Transformer Engine
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # needed for the overlap of tensor parallelism
export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}  # leave multiprocessors to NCCL's kernels
export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}

# vLLM
export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}     # compute nodes have no internet access
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}               # checkpoints are local, and many ranks must not query the hub

# pyxis and enroot
export MELLANOX_VISIBLE_DEVICES=${MELLANOX_VISIBLE_DEVICES:-all}  # InfiniBand devices in the container

# Python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}             # by default each rank would use every core
export PYTHONFAULTHANDLER=1                              # tracebacks of segmentation faults
export PYTHONUNBUFFERED=1                                # log the last line before a crash
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}          # libraries' warnings, once per rank
