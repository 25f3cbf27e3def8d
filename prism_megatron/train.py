"""Run one stage: ``torchrun --nproc-per-node N -m prism_megatron.train --config FILE.yaml [key=value ...]``.

FILE.yaml has the stage's settings, like the config.yaml that every run writes; ``recipes.train`` takes a recipe's name.

Exit status: 0 finished, 2 a user error (one line on stderr), 75 stopped by TERM or Ctrl-C after saving (start it
again), 130 ended at once by Ctrl-C (a second one, or before the run is set up), else a crash.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prism_megatron import config as cfg
from prism_megatron.errors import SharedError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage of a configuration file. A user error is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.yaml", help="settings of one stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parsed = parser.parse_intermixed_args(arguments)
    return run(lambda: cfg.apply_overrides(cfg.read_yaml(parsed.config), parsed.overrides))


def run_and_exit(config: cfg.StageConfig) -> None:
    """Run a stage and exit with its status."""
    sys.exit(run(lambda: cfg.apply_overrides(config, [])))


def run(resolve: Callable[[], cfg.StageConfig]) -> int:
    """Run the stage that ``resolve`` returns, on this rank. Returns the exit status."""
    from prism_megatron.stages.preemption import EXIT_STATUS, INTERRUPTED, Preempted, follow_torchrun

    follow_torchrun()
    gc.disable()  # until the first iteration: what imports and readers make stays, and is many objects to look through
    try:
        run_stage(resolve())
    except Preempted as stop:
        from prism_megatron.parallel import groups

        if groups.is_main_rank():
            print(f"{stop}; the same command goes on from there", flush=True)
        groups.shutdown()
        return EXIT_STATUS
    except KeyboardInterrupt:  # the stage does not listen yet
        if os.environ.get("RANK", "0") == "0":
            print("ended before there was anything new to save; the same command starts again", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, SharedError) and _in_a_group():
            # before, all ranks see the same: the command line and its files
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        gc.enable()
    return 0


def _in_a_group() -> bool:
    import torch

    return torch.distributed.is_initialized()


def run_stage(config: cfg.StageConfig) -> None:
    """Run a stage from wherever it was left."""
    from prism_megatron.stages.identity import is_finished

    if is_finished(config):
        if os.environ.get("RANK", "0") == "0":
            print(f"{config.stage}: already finished in {cfg.stage_dir(config)}", flush=True)
        return
    from prism_megatron.model.fp8 import check_hardware
    from prism_megatron.stages.setup import check_settings

    check_hardware(config.model)
    check_settings(config)
    if isinstance(config, cfg.SFTConfig):
        from prism_megatron.stages.sft import run_sft

        run_sft(config)
    elif isinstance(config, cfg.CollectConfig):
        from prism_megatron.stages.collect import run_collect

        run_collect(config)
    elif isinstance(config, cfg.WarmupConfig):
        from prism_megatron.stages.warmup import run_warmup

        run_warmup(config)
    elif isinstance(config, cfg.AlignConfig):
        from prism_megatron.stages.align import run_align

        run_align(config)
    else:
        assert isinstance(config, cfg.RLVRConfig)
        from prism_megatron.stages.rlvr import run_rlvr

        run_rlvr(config)


if __name__ == "__main__":
    sys.exit(main())
