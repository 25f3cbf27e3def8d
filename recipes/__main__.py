"""NeMo-Run's own command line for one stage; ``recipes/factories.py`` shows how to use it."""

from __future__ import annotations

from prism_megatron.train import run_and_exit
from recipes import factories

if __name__ == "__main__":
    factories.run.cli.main(run_and_exit, default_plugins=factories.run.Config(factories.StageFolder))
