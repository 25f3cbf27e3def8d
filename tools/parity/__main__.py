"""Compare the trainer's Qwen3-VL with HF transformers' at any parallel layout.

    python -m tools.parity --hf runs/tiny/base --tp 2 --pp 2 --gradients

Starts ranks, runs both models on the same chats in float32 and prints one JSON line with the largest differences,
absolute and relative to the largest value compared. Exit status 1 means beyond the tolerance, 2 a user error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from prism_megatron.config import ParallelConfig
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import read_sizes
from prism_megatron.parallel.degrees import check_degrees


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="HF Qwen3-VL checkpoint directory")
    for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--packed", action="store_true", help="all rows of a rank in one packed micro-batch")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--inputs", type=Path, help="JSON Lines, one chat in HF's messages format per line")
    parser.add_argument(
        "--dump", type=Path, help="file for the trainer's logits: row_0 [tokens, vocabulary], input_ids_0"
    )
    parser.add_argument("--gradients", action="store_true", help="compare gradients too")
    arguments = parser.parse_args()
    try:
        return report(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(arguments: argparse.Namespace) -> int:
    """Compare, print and dump. Returns the exit status."""
    import torch
    from safetensors.torch import save_file

    from tools.parity.cases import GRADIENT_TOLERANCE, LOGITS_TOLERANCE, Case, compare
    from tools.parity.hf import hf_results
    from tools.parity.inputs import default_chats, encode_rows, read_chats
    from tools.parity.ranks import run_cases

    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        virtual_pipeline_model_parallel_size=arguments.vpp,
        context_parallel_size=arguments.cp,
        expert_model_parallel_size=arguments.ep,
        expert_tensor_parallel_size=arguments.etp,
        sequence_parallel=arguments.sequence_parallel,
    )
    ranks = arguments.tp * arguments.pp * arguments.cp * arguments.dp
    sizes = read_sizes(arguments.hf)
    check_degrees(parallel, ranks, sizes.degrees())
    rows = encode_rows(arguments.hf, read_chats(arguments.inputs) if arguments.inputs else default_chats())
    case = Case(
        ranks,
        parallel,
        batching="packed" if arguments.packed else "single",
        recompute=arguments.recompute,
        gradients=arguments.gradients,
        distributed_optimizer=arguments.distributed_optimizer,
    )
    reference = hf_results(arguments.hf, rows, arguments.gradients, 0.0)
    (ours,) = run_cases(arguments.hf, rows, [case])
    measured = compare(ours, reference)
    within = measured["logits_relative"] <= LOGITS_TOLERANCE
    within &= measured.get("gradients_relative", 0.0) <= GRADIENT_TOLERANCE
    print(json.dumps({"layout": case.name, "rows": len(rows), **measured, "within_tolerance": within}))
    if arguments.dump:
        dumped = {name: tensor for name, tensor in ours.items() if name.startswith("row_")}
        dumped |= {f"input_ids_{number}": torch.tensor(row.token_ids) for number, row in enumerate(rows)}
        save_file(dumped, arguments.dump)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
