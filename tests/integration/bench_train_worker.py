"""Several runs of the training benchmark in one start of the ranks, given as JSON: [[PORT, [ARGUMENT, ...]], ...].

A run leaves the process groups; the next ones meet at the port of another store.
"""

from __future__ import annotations

import json
import os
import sys

from tools.bench import train

for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["tools.bench.train", *arguments]
    if status := train.main():
        sys.exit(status)
