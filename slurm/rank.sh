#!/bin/bash
# Run one rank under srun: bash slurm/rank.sh COMMAND...
# Sets torch.distributed's variables from SLURM's, writes the output to a file per rank with time and rank in each line
# (rank 0 also to the console), and records the first rank to fail.
# Needs PRISM_LOGS, MASTER_ADDR and MASTER_PORT (slurm/job.sh sets them).
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export PYTHONPATH=$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
cd "${PRISM_WORKDIR:-.}" || exit 1
umask o= # as in job.sh; srun may not pass it on
log=$PRISM_LOGS/rank_$(printf %04d "$RANK").log

stamp() { # the time in microseconds sorts, for `sort -m` on the files of all ranks
  trap '' TERM # the last lines of a rank after SIGTERM matter most
  local LC_ALL=C line now # C: a point as decimal separator
  while IFS= read -r line || [ -n "$line" ]; do
    now=$EPOCHREALTIME # read once, so that both parts agree
    printf '%(%F %T)T.%s [%s] %s\n' "${now%.*}" "${now#*.}" "$RANK" "$line" >>"$log"
    [ "$RANK" != 0 ] || printf '%s\n' "$line"
  done
}

exec 3> >(stamp)
stamper=$!
"$@" >&3 2>&1 &
rank=$!
terminated=no
trap 'terminated=yes; kill -TERM $rank 2>/dev/null' TERM
wait $rank
status=$?
while kill -0 $rank 2>/dev/null; do # a trap interrupts wait
  wait $rank
  status=$?
done
if [ $status -ne 0 ]; then
  what=failed
  case $terminated$status in yes75 | yes143) what=stopped ;; esac # saved, or had nothing to save yet
  # Others fail because this one did: only the first writes.
  (set -o noclobber; echo "$what $RANK $(hostname) $LOCAL_RANK $status" >"$PRISM_LOGS/first_end") 2>/dev/null
fi
exec 3>&-
wait $stamper
exit $status
