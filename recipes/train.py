"""Run one stage of a recipe: ``torchrun --nproc-per-node N -m recipes.train NAME [key=value ...]``.

``--config FILE.yaml`` in place of NAME takes a configuration file. Exit statuses are those of ``prism_megatron.train``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prism_megatron import config as cfg
from prism_megatron import train
from recipes import STAGE_RECIPES, stage_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage. A user error is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n  ".join([f"{__doc__}\nRecipes:", *STAGE_RECIPES]))
        return 0
    if arguments[0].startswith("--config"):
        return train.main(arguments)
    name, *overrides = arguments
    return train.run(lambda: load(name, overrides))


def load(name: str, overrides: Sequence[str]) -> cfg.StageConfig:
    """Return a recipe's configuration with overrides applied. Raises UserError for unknown names and keys."""
    return cfg.apply_overrides(stage_recipe(name)(), overrides)


if __name__ == "__main__":
    sys.exit(main())
