"""NeMo-Run's own command line for one stage; ``recipes/factories.py`` shows how to use it."""

from __future__ import annotations

import sys

from prism_megatron.errors import UserError
from prism_megatron.train import run_and_exit
from recipes import factories

if __name__ == "__main__":
    try:
        factories.run.cli.main(run_and_exit, default_plugins=factories.run.Config(factories.StageFolder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
