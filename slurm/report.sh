#!/bin/bash
# report.sh LOGS STAGE STATUS: print why a job ended early; the traceback of the first rank to fail comes last.
logs=$1 stage=$2 status=$3
if ls "$logs"/unhealthy_* >/dev/null 2>&1; then
  echo "prism: $stage did not start, on nodes that are not healthy; logs: $logs"
  cat "$logs"/unhealthy_*
  exit
fi
if ! read -r what rank host gpu code 2>/dev/null <"$logs/first_end"; then
  echo "prism: $stage failed with status $status before or outside its ranks (time limit, node, srun); logs: $logs"
  exit
fi
log=$logs/rank_$(printf %04d "$rank").log
if [ "$what" = stopped ]; then
  did="saved; it continues from there"
  [ "$code" -eq 75 ] || did="had nothing to save yet; it continues from its last checkpoint"
  echo "prism: $stage received SIGTERM and $did when it is restarted; log: $logs/rank_0000.log"
  exit
fi
echo "prism: $stage failed; rank $rank on $host, GPU $gpu, was the first to end, with status $code; log: $log"
[ "$code" -lt 128 ] || echo "prism: status $code is signal $((code - 128)): $(kill -l $((code - 128))); 9 is often memory"
# Only rank 0 prints a user error that all ranks have.
[ "$code" -ne 2 ] || grep -q "error on rank" "$log" || log=$logs/rank_0000.log
awk '/Traceback \(most recent call last\)/ { n = 0; found = 1 } { line[n++ % 60] = $0 }
     END { for (i = (n > 60 ? n - 60 : 0); i < n; i++) print line[i % 60] }' "$log"
