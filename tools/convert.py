"""Convert a checkpoint between HF and Megatron tensor by tensor, without GPU or ranks and in little memory.

    python -m tools.convert hf-to-megatron --hf DIR --out DIR [--tp N] [--pp N] [--ep N]
    python -m tools.convert megatron-to-hf --megatron DIR --out DIR [--verify HF_DIR]

A Megatron checkpoint loads at any parallel layout; --tp, --pp and --ep only choose the stored shards. The same command
continues an interrupted conversion. --out appears when it is complete; its manifest.json lists all tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prism_megatron.config import ParallelConfig
from prism_megatron.convert.rules import PARTS
from prism_megatron.errors import UserError
from prism_megatron.observe.progress import ProgressBar

if TYPE_CHECKING:
    from prism_megatron.convert.convert_checkpoint import Converted, Report


def main(arguments: list[str] | None = None) -> int:
    """Run the command. A user error or a broken checkpoint is one line on stderr and exit status 2."""
    args = _parser().parse_args(arguments)
    try:
        with ProgressBar(args.command, is_bytes=True) as bar:
            done = _convert(args, bar.update)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in done.tensors:
        print(f"{entry.sha256[:16]}  {entry.dtype:<4} {entry.bytes:>14,}  {list(entry.shape)}  {entry.name}")
    print(json.dumps({"out": str(done.directory), "tensors": len(done.tensors), "bytes": done.bytes}))
    return 0


def _convert(args: argparse.Namespace, report: Report) -> Converted:
    from prism_megatron.convert.convert_checkpoint import hf_to_megatron, megatron_to_hf

    if args.command == "hf-to-megatron":
        parallel = ParallelConfig(
            tensor_model_parallel_size=args.tp,
            pipeline_model_parallel_size=args.pp,
            expert_model_parallel_size=args.ep,
        )
        return hf_to_megatron(args.hf, args.out, parallel, report=report)
    return megatron_to_hf(args.megatron, args.out, args.template, args.part, args.verify, report=report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="HF directory to a Megatron distributed checkpoint")
    to_megatron.add_argument("--hf", type=Path, required=True, help="directory of the HF checkpoint")
    to_megatron.add_argument("--tp", type=int, default=1, help="tensor-parallel size to store shards for")
    to_megatron.add_argument("--pp", type=int, default=1, help="pipeline-parallel size; each stage starts a new file")
    to_megatron.add_argument("--ep", type=int, default=1, help="expert-parallel size to store shards for")
    to_hf = commands.add_parser("megatron-to-hf", help="Megatron distributed checkpoint to an HF directory")
    to_hf.add_argument(
        "--megatron", type=Path, required=True, help="converted directory, or an iter_ directory of a run"
    )
    to_hf.add_argument("--template", type=Path, help="HF directory with config and tokenizer for an iter_ directory")
    to_hf.add_argument("--part", choices=PARTS, help="model to export, if the checkpoint has several")
    to_hf.add_argument("--verify", type=Path, help="HF directory whose tensors the result must equal bit by bit")
    for command in (to_megatron, to_hf):
        command.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
