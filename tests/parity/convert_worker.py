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
from prism_megatron.parallel import cpu, groups

cpu.install()


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = [run(**case) for case in cases]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(everybody))
    dist.destroy_process_group()


def run(hf: str, megatron: str, part: str, degrees: dict[str, int], chunks: int = 1) -> dict[str, Any]:
    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.native import load_megatron
    from prism_megatron.convert.transfer import export_weights, load_weights, named_parameters

    parallel = ParallelConfig(**degrees)
    groups.initialize(parallel, seed=1)
    model, table = stages(Path(hf), part, parallel, chunks)
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
    held = {name: parameter.numel() for name, parameter in parameters.items()}
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    return {"wrong": wrong, "differ": differ, "exported": len(exported), "held": held}


def stages(hf: Path, part: str, parallel: ParallelConfig, chunks: int) -> tuple[list[nn.Module], list[Any]]:
    """This rank's virtual pipeline chunks of a model, as Megatron divides it, and the table."""
    from prism_megatron.convert.qwen3_vl import discriminator_table, policy_table
    from prism_megatron.model.build import read_sizes

    sizes = read_sizes(hf)
    config = ModelConfig(hf_checkpoint=str(hf))
    experts = sizes.num_experts or 0
    discriminator = DiscriminatorConfig(str(hf), experts, 2, "dedicated", 0.1, 0.01)
    table = policy_table(sizes) if part == "policy" else discriminator_table(sizes, experts, 2)
    return [one_stage(config, discriminator, parallel, sizes, part, n, chunks) for n in range(chunks)], table


def one_stage(
    config: ModelConfig,
    discriminator: DiscriminatorConfig,
    parallel: ParallelConfig,
    sizes: Any,
    part: str,
    chunk: int,
    chunks: int,
) -> nn.Module:
    from megatron.core import parallel_state, tensor_parallel

    from prism_megatron.model.build import build_discriminator, build_policy
    from prism_megatron.model.layer_spec import decoder_block_spec
    from prism_megatron.model.qwen3_vl import DeepStackBlock

    if part == "policy":
        model: Any = build_policy(config, parallel, sizes)
    else:
        model = build_discriminator(config, parallel, discriminator, sizes)
    pipeline = parallel.pipeline_model_parallel_size
    if pipeline == 1:
        return model
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first, last = stage == chunk == 0, (stage, chunk) == (pipeline - 1, chunks - 1)
    text = model.config
    text.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
    spec = decoder_block_spec(text, text.num_layers // pipeline // chunks)
    model.decoder = DeepStackBlock(
        config=text, spec=spec, pre_process=first, post_process=last, vp_stage=chunk if chunks > 1 else None
    )
    if not first:
        del model.vision, model.embedding
    model.pre_process, model.post_process = first, last
    if not last:
        model.output_layer = None
    elif part != "policy":
        model.share_embeddings_and_output_weights = False  # no output layer to share with
    elif not first:
        model.output_layer = tensor_parallel.ColumnParallelLinear(
            text.hidden_size,
            sizes.text["vocab_size"],
            config=text,
            init_method=text.init_method,
            bias=False,
            gather_output=False,
        )
    return model


if __name__ == "__main__":
    main()
