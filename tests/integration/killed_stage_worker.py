"""Runs a stage and is killed: ``killed_stage_worker.py ITERATION SECONDS RECIPE [key=value ...]``.

A timer of processor time, started when a rank has logged the iteration, ends it as kill -9 does. However busy the
machine is, that happens at about the same work.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from unittest.mock import patch

from prism_megatron.observe.logger import MetricsLog
from recipes.train import main

kill_at, seconds = int(sys.argv[1]), float(sys.argv[2])
log = MetricsLog.log


def log_and_arm(self: MetricsLog, iteration: int, measured: Mapping[str, float | None]) -> None:
    log(self, iteration, measured)
    if iteration == kill_at:
        signal.setitimer(signal.ITIMER_PROF, seconds)


with patch.object(MetricsLog, "log", log_and_arm):
    sys.exit(main(sys.argv[3:]))
