# Sourced by a batch script before its srun: log folder, rendezvous, health check, and what happens at the end of the job.
#
#   PRISM_STAGE_DIR        the stage's folder, <run.dir>/<run.name>
#   PRISM_WORKDIR          working directory of the ranks, the start of relative paths (default: where sbatch was called)
#   PRISM_MAX_CRASHES      times that a job is requeued after a crash or on unhealthy nodes (2)
#   PRISM_MAX_PREEMPTIONS  times that it is requeued after SIGTERM, which is not a failure (100)
#   PRISM_CONSOLE          file (or pattern of its name) that gets the report of a failure, too
umask o= # no access to logs and weights for other users
PRISM_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PRISM_WORKDIR=${PRISM_WORKDIR:-$SLURM_SUBMIT_DIR}
PRISM_JOB_LOGS=$PRISM_WORKDIR/$PRISM_STAGE_DIR/logs/job$SLURM_JOB_ID
case $PRISM_STAGE_DIR in /*) PRISM_JOB_LOGS=$PRISM_STAGE_DIR/logs/job$SLURM_JOB_ID ;; esac
export PRISM_LOGS=$PRISM_JOB_LOGS/start${SLURM_RESTART_COUNT:-0}
mkdir -p "$PRISM_LOGS"

prism_at_exit() {
  set +evx
  trap - EXIT
  local status=$1 what rank host gpu code
  if [ "$status" -eq 0 ]; then
    [ ! -e "$PRISM_JOB_LOGS/../../finished.json" ] || exit 0
    echo "prism: $PRISM_STAGE_DIR has no finished.json though every rank ended well"
    exit 1
  fi
  read -r what rank host gpu code 2>/dev/null <"$PRISM_LOGS/first_end" || what=failed code=$status
  local again=no
  if [ "$what" = stopped ]; then
    prism_again preemptions "${PRISM_MAX_PREEMPTIONS:-100}" && again=yes
  elif [ "$code" -ne 2 ]; then # 2: a wrong command line stays wrong
    prism_again crashes "${PRISM_MAX_CRASHES:-2}" && again=yes
  fi
  local report=$PRISM_LOGS/report.txt
  bash "$PRISM_SLURM/report.sh" "$PRISM_LOGS" "$PRISM_STAGE_DIR" "$status" >"$report"
  cat "$report"
  local console=$(compgen -G "$PRISM_CONSOLE" | head -n1)
  [ -z "$PRISM_CONSOLE" ] || [ -z "$console" ] || cat "$report" >>"$console"
  # A cancelled job is not RUNNING any more, and must not be requeued.
  if [ $again = yes ] && [ "$(prism_ask squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    trap '' TERM # requeue sends TERM; excluded nodes can only be set on a pending job
    prism_ask scontrol requeue "$SLURM_JOB_ID" || echo "prism: the job could not be put back; submit it again"
    prism_avoid_unhealthy
  fi
  exit "$status"
}

prism_ask() { # COMMAND...: retry, since a busy or restarting controller does not answer
  local try
  for try in 1 2 3 4 5; do
    "$@" && return
    sleep $((2 * try))
  done
  return 1
}

prism_again() { # KIND LIMIT: count one more; true within the limit
  echo >>"$PRISM_JOB_LOGS/$1"
  local count=$(wc -l <"$PRISM_JOB_LOGS/$1")
  echo "prism: $1 of $PRISM_STAGE_DIR: $count of $2 allowed"
  [ "$count" -le "$2" ]
}

prism_avoid_unhealthy() { # also exclude the nodes that check_node.sh refused, if enough others are left
  local unhealthy=$(ls "$PRISM_LOGS" | sed -n 's/^unhealthy_//p')
  [ -n "$unhealthy" ] || return 0
  local before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^(].*\)/\1/p')
  [ -z "$before" ] || unhealthy+=$'\n'$(scontrol show hostnames "$before")
  local others=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u | grep -cvxF "$unhealthy")
  [ "$others" -lt "$SLURM_NNODES" ] || scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$(paste -sd, <<<"$unhealthy")"
}

trap : TERM # wait for the ranks, which save
trap 'prism_at_exit $?' EXIT
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # unique per job, as jobs may share a node
source "$PRISM_SLURM/env.sh"
if command -v nvidia-smi >/dev/null; then
  srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash "$PRISM_SLURM/check_node.sh" || exit 1
fi
