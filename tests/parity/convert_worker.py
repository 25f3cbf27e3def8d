"""Runs under torchrun: weights in and out at several parallel layouts, every tensor compared bit by bit.

Arguments: a JSON list of cases, where to write what was found. A case names an HF directory, the same converted, which
model it is, and degrees.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prism_megatron.config import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_megatron.parallel import groups


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = [run(**case) for case in cases]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(everybody))
    dist.destroy_process_group()


def run(hf: str, megatron: str, part: str, degrees: dict[str, int]) -> dict[str, Any]:
    from megatron.core import parallel_state

    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.load_checkpoint import load_megatron
    from prism_megatron.convert.transfer import export_weights, load_weights, named_parameters

    parallel = ParallelConfig(**degrees)
    groups.initialize(parallel, seed=1)
    model, table = build(Path(hf), part, parallel)
    parameters = named_parameters(model)
    for parameter in parameters.values():
        nn.init.constant_(parameter, float("nan"))
    with HFWeights(Path(hf)) as weights:
        load_weights(model, table, weights)
        exported = dict(export_weights(model, table, bucket_bytes=50_000))
        wrong = sorted(weights.names ^ set(exported))
        wrong += [name for name, tensor in exported.items() if not torch.equal(tensor, weights[name])]
    filled = {name: parameter.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        nn.init.constant_(parameter, float("nan"))
    load_megatron(model, Path(megatron), part)
    differ = [name for name, parameter in parameters.items() if not torch.equal(parameter, filled[name])]
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    parallel_state.destroy_model_parallel()
    return {"wrong": wrong, "differ": differ, "exported": len(exported), "held": sizes}


def build(hf: Path, part: str, parallel: ParallelConfig) -> tuple[list[Any], list[Any]]:
    """This rank's chunks of a model, and the table."""
    from prism_megatron.convert.qwen3_vl import discriminator_table, policy_table
    from prism_megatron.model.build import build_discriminator, build_policy
    from prism_megatron.model.sizes import read_sizes

    sizes, config = read_sizes(hf), ModelConfig(hf_checkpoint=str(hf))
    if part == "policy":
        return list(build_policy(config, parallel, sizes)), policy_table(sizes)
    experts = sizes.num_experts or 0
    discriminator = DiscriminatorConfig(str(hf), experts, 2, "dedicated", 0.1, 0)
    built = build_discriminator(config, parallel, discriminator, sizes)
    return list(built), discriminator_table(sizes, experts, 2)


if __name__ == "__main__":
    main()
