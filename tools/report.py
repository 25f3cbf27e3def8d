"""Write the report of a run from what its stages logged: ``python -m tools.report runs/quickstart``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prism_megatron.observe.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the folder of a run")
    try:
        print(write_report(parser.parse_args().run_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
