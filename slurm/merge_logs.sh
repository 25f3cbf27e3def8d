#!/bin/bash
# merge_logs.sh RUN_DIR/STAGE/logs/jobN/startM: print the lines of all ranks in order of time (nodes' clocks may differ).
export LC_ALL=C # byte order, like the time stamps
exec sort -m -k1,2 "$1"/rank_*.log
