"""Run a recipe or a pipeline, here with torchrun or on SLURM through NeMo-Run.

    python -m recipes.launch NAME [--dryrun] [--ranks N] [K=V ...]
    python -m recipes.launch NAME --executor slurm --cluster FILE [--dryrun] [--detach] [K=V ...]
    python -m recipes.launch NAME --estimate | --show [K=V ...]
    python -m recipes.launch --config FILE.yaml ...

A recipe takes key=value, a pipeline stage.key=value (rlvr.run.train_iters=40). A pipeline is SFT, collection, warm-up,
alignment and RLVR, each from the checkpoint of the one before; tiny_study is the tiny one with three seeds, each
compared with RLVR straight after SFT, here only. FILE.yaml is the configuration of one stage, as --show prints it and
every run writes it. Finished stages are skipped, an interrupted one goes on from its last checkpoint, and one whose
settings or inputs have changed is moved aside and run again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prism_megatron.config import to_yaml
from prism_megatron.errors import UserError
from recipes import STAGE_RECIPES, is_config_file, shape_of
from recipes.layouts import LAYOUTS, parse_name
from recipes.local_run import launch, stop_on_signals
from recipes.pipeline import PIPELINES, Step, steps_of, study_steps
from recipes.slurm_run import Submission, launch_on_slurm


def main() -> int:
    """Parse the command line and run it. A user error is one line on stderr and exit status 2."""
    parser = _parser()
    arguments = parser.parse_intermixed_args()  # overrides may follow options
    if arguments.config is not None:
        arguments.overrides[:0] = [arguments.name] * (arguments.name is not None)
        arguments.name = str(arguments.config)
    elif arguments.name is None:
        parser.error("give the NAME of a recipe or pipeline, or --config FILE.yaml")
    if arguments.executor == "local":
        stop_on_signals()
    else:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
    if arguments.run_name and arguments.name not in PIPELINES:
        arguments.overrides.insert(0, f"run.name={arguments.run_name}")
    arguments.run_name = arguments.run_name or arguments.name
    try:
        _check(arguments)
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n  ".join(["names:", *PIPELINES, *STAGE_RECIPES]),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a pipeline or a recipe")
    parser.add_argument("overrides", nargs="*", help="key=value, or stage.key=value for a pipeline")
    parser.add_argument("--config", type=_config_file, metavar="FILE.yaml", help="a stage's configuration, not NAME")
    parser.add_argument("--name", dest="run_name", help="folder under runs/ (default: the pipeline's or the recipe's)")
    parser.add_argument(
        "--ranks",
        type=int,
        help="processes per stage, here (default: as the recipe's name says; tiny: 2, or 1 on one core or a GPU)",
    )
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument("--cluster", type=Path, help="cluster file for slurm; examples in slurm/clusters/")
    parser.add_argument("--dryrun", action="store_true", help="print commands or scripts, run and submit nothing")
    parser.add_argument("--detach", action="store_true", help="submit to slurm and exit")
    parser.add_argument("--estimate", action="store_true", help="print the estimated GPU memory, run nothing")
    parser.add_argument("--show", action="store_true", help="print the resolved configuration as YAML, run nothing")
    return parser


def _config_file(path: str) -> Path:
    if not is_config_file(path):
        raise argparse.ArgumentTypeError(f"{path} must end in .yaml")
    return Path(path)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if arguments.estimate and arguments.ranks is not None:
        raise UserError("--ranks is for a run here; --estimate takes the GPUs that the recipe's name says")
    if arguments.executor == "slurm" and not (arguments.estimate or arguments.show):
        if arguments.cluster is None:
            raise UserError("--executor slurm needs --cluster FILE; slurm/clusters/ has examples")
        if arguments.ranks is not None:
            raise UserError("--ranks is for a run here; on SLURM the recipe's name says it, or the cluster file")
    for option in ("cluster", "detach") if arguments.executor == "local" else ():
        if getattr(arguments, option):
            raise UserError(f"--{option} is for SLURM; add --executor slurm, or leave it out to run here")


def _run(arguments: argparse.Namespace) -> int:
    name, run_name, overrides = arguments.name, arguments.run_name, arguments.overrides
    if arguments.show:
        print_configurations(name, run_name, overrides)
        return 0
    if arguments.estimate:
        print_estimate(steps_of(name, run_name, overrides))
        return 0
    if arguments.executor == "local":
        return launch(name, run_name, overrides, arguments.ranks, arguments.dryrun)
    steps = steps_of(name, run_name, overrides)
    submission = Submission(
        Path(name).stem,
        steps,
        arguments.cluster,
        arguments.dryrun,
        arguments.detach,
        Path("runs") / run_name if name == "tiny_pipeline" else None,
    )
    return launch_on_slurm(submission)


def print_configurations(name: str, run_name: str, overrides: Sequence[str]) -> None:
    """Print the YAML of every step, one document each, as ``--config`` reads it."""
    if name == "tiny_study":
        steps = [step for steps in study_steps(run_name, overrides).values() for step in steps]
    else:
        steps = steps_of(name, run_name, overrides)
    print("---\n".join(f"# {step.name}: {step.recipe}\n{to_yaml(step.config())}" for step in steps), end="")


def print_estimate(steps: Sequence[Step]) -> None:
    """Print the memory of each step's most loaded GPU. Raises UserError at the first step that does not fit."""
    from recipes.estimate.memory import estimate, published_sizes

    for step in steps:
        if step.recipe not in LAYOUTS:
            raise UserError(f"--estimate is for recipes of published sizes, not {step.recipe!r}; --help lists them")
        _, size, _ = parse_name(step.recipe)
        nodes, gpus = shape_of(step.recipe) or (1, 1)
        with tempfile.TemporaryDirectory() as folder:
            policy, discriminator = (published_sizes(each, Path(folder)) for each in (size, "2b"))
        memory = estimate(step.config(), nodes * gpus, policy, discriminator)
        print(step.recipe)
        memory.check()
        print(memory.table())
    print("estimated with the assumptions of recipes/estimate/memory.py; not measured on a GPU")


if __name__ == "__main__":
    sys.exit(main())
