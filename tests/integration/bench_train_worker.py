"""Several runs of the training benchmark in one start of the ranks, given as JSON: [[PORT, [ARGUMENT, ...]], ...].

A run leaves the process groups, and the next ones meet at a port of their own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import bench_train

os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["bench_train.py", *arguments]
    if status := bench_train.main():
        sys.exit(status)
