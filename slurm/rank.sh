#!/bin/bash
# One rank under srun: bash slurm/rank.sh COMMAND...
# Gives COMMAND torch.distributed's names for SLURM's numbers, writes its output to a file of its own with the time and
# the rank before each line (rank 0 also to the console), and leaves a note if it is the first rank to fail.
# Needs PRISM_LOGS, MASTER_ADDR and MASTER_PORT (slurm/job.sh sets them).
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export PYTHONPATH=$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
cd "${PRISM_WORKDIR:-.}" || exit 1
umask o= # as in job.sh, whose umask srun need not pass on
log=$PRISM_LOGS/rank_$(printf %04d "$RANK").log

stamp() { # the time in microseconds sorts, so that `sort -m` merges the files of all ranks
  trap '' TERM # the last lines of a rank after SIGTERM matter most
  local LC_ALL=C line now # C: a point before the microseconds
  while IFS= read -r line || [ -n "$line" ]; do
    now=$EPOCHREALTIME # read once: a second may end between two readings
    printf '%(%F %T)T.%s [%s] %s\n' "${now%.*}" "${now#*.}" "$RANK" "$line" >>"$log"
    [ "$RANK" != 0 ] || printf '%s\n' "$line"
  done
}

exec 3> >(stamp)
stamper=$!
"$@" >&3 2>&1 &
rank=$!
told=no
trap 'told=yes; kill -TERM $rank 2>/dev/null' TERM
wait $rank
status=$?
while kill -0 $rank 2>/dev/null; do # a trap ends wait before the rank ends
  wait $rank
  status=$?
done
if [ $status -ne 0 ]; then
  what=failed
  case $told$status in yes75 | yes143) what=stopped ;; esac # saved, or ended while it still had nothing to save
  # Others fail because this one did: only the first may write.
  (set -o noclobber; echo "$what $RANK $(hostname) $LOCAL_RANK $status" >"$PRISM_LOGS/first_end") 2>/dev/null
fi
exec 3>&-
wait $stamper
exit $status
