#!/bin/bash
# merge_logs.sh RUN_DIR/STAGE/logs/jobN/startM: the lines of all ranks in the order of their time (nodes' clocks differ).
export LC_ALL=C # the order of the bytes, as they were stamped
exec sort -m -k1,2 "$1"/rank_*.log
