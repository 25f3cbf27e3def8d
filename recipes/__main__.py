"""NeMo-Run's command line for one stage; ``recipes/factories.py`` describes its use."""

from __future__ import annotations

import sys
from typing import Any

import fiddle

from prism_megatron.config import StageConfig, apply_overrides
from prism_megatron.errors import UserError
from prism_megatron.stages.identity import is_finished
from prism_megatron.train import run_and_exit
from recipes import STAGE_RECIPES, factories
from recipes.upstream import cli_error

run = factories.run


class CheckedContext(run.cli.RunContext):  # type: ignore[name-defined, misc]
    """NeMo-Run's context. Refuses a wrong configuration before it is printed, stored or run."""

    stage: StageConfig | None = None  # configuration of the task, once parsed

    def parse_fn(self, fn: Any, args: list[str], **defaults: Any) -> Any:
        task = super().parse_fn(fn, args, **defaults)
        self.stage = apply_overrides(fiddle.build(task.config), [])
        return task

    def parse_executor(self, name: str, *args: str) -> Any:
        if name == "slurm":
            factories.slurm()  # NeMo-Run would report its UserError as an unknown name
        return super().parse_executor(name, *args)

    def cli_execute(self, fn: Any, args: list[str], *kind: Any) -> None:
        try:
            super().cli_execute(fn, args, *kind)
        except (UserError, cli_error()) as error:  # NeMo-Run would call it unexpected and exit with status 0
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        has_run = isinstance(self.executor, run.LocalExecutor) and not self.dryrun
        if has_run and not self._exports() and self.stage is not None and not is_finished(self.stage):
            sys.exit(1)  # NeMo-Run exits with status 0

    def _exports(self) -> bool:
        """Return whether the configuration is written to a file and nothing runs."""
        return any((self.to_yaml, self.to_toml, self.to_json))


def main() -> None:
    """Run the command line. A user error is one line on stderr and exit status 2."""
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):  # NeMo-Run cannot describe string annotations
        print("\n  ".join([f"{factories.__doc__}\nFactories:", *STAGE_RECIPES]))
        return
    run.cli.main(run_and_exit, default_plugins=run.Config(factories.StageFolder), run_ctx_cls=CheckedContext)


if __name__ == "__main__":
    main()
