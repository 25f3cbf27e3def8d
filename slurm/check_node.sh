#!/bin/bash
# check_node.sh: check this node's GPUs, once per node before the ranks start; writes a fault to
# PRISM_LOGS/unhealthy_NODE. Not verified on GPUs.
fault() { echo "prism: $SLURMD_NODENAME: $*" | tee "$PRISM_LOGS/unhealthy_$SLURMD_NODENAME" >&2; exit 1; }
timeout 60 nvidia-smi -L >/dev/null || fault "nvidia-smi does not answer; drain the node"
expected=${SLURM_GPUS_ON_NODE:-0}
found=$(nvidia-smi -L | wc -l)
[ "$found" -ge "$expected" ] || fault "$found GPUs of $expected are visible"
errors=$(nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits | grep -cv '^\(0\|\[N/A\]\)$')
[ "$errors" -eq 0 ] || fault "$errors GPUs have uncorrected memory errors"
pending=$(nvidia-smi --query-remapped-rows=remapped_rows.pending --format=csv,noheader | grep -ci '^\(yes\|1\)$')
[ "$pending" -eq 0 ] || fault "$pending GPUs wait for a reset to remap memory rows"
used=$(nvidia-smi --query-compute-apps=process_name --format=csv,noheader | grep -cv nvidia-cuda-mps) # the MPS server is not a job
[ "$used" -eq 0 ] || fault "$used processes of another job still hold a GPU"
shm=$(df --output=avail -BG /dev/shm | tail -n1 | tr -dc 0-9)
[ "$shm" -ge 8 ] || fault "/dev/shm has ${shm} GB free; NCCL and the engine need some"
