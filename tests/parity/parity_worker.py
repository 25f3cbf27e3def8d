"""Runs under torchrun: compare the Megatron policy with HF on packed sequences, and say by how much they differ.

Arguments: checkpoint, tensor-parallel size, sequence parallel (0 or 1), where to write the measurements.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from prism_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.parallel import groups
from prism_megatron.types import EncodedPrompt, PackedBatch


def sequences(sizes: Any, image_token: int) -> list[TrainingSequence]:
    """Three prompts with images of different shapes, one of them answered twice."""
    generator = torch.Generator().manual_seed(0)
    patch_dim = 3 * sizes.vision["temporal_patch_size"] * sizes.vision["patch_size"] ** 2

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(20, sizes.text["vocab_size"] - 20, (count,), generator=generator).tolist())

    made = []
    for height, width, answer in ((6, 6, 20), (4, 8, 31), (6, 6, 11)):
        pixels = torch.randn(height * width, patch_dim, generator=generator)
        ids = words(5) + (image_token,) * (height * width // 4) + words(7)
        prompt = EncodedPrompt(ids, pixels, torch.tensor([[1, height, width]]))
        made.append(TrainingSequence(prompt, words(answer)))
    return [*made, TrainingSequence(made[0].prompt, made[1].response_ids)]


def main() -> None:
    checkpoint, tp = Path(sys.argv[1]), int(sys.argv[2])
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sys.argv[3] == "1")
    groups.initialize(parallel, seed=1)
    from transformers import AutoModelForImageTextToText

    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.convert.transfer import export_weights, load_weights
    from prism_megatron.model.build import build_policy, read_sizes, wrap_for_training
    from prism_megatron.model.logprobs import token_entropy, token_logprobs
    from prism_megatron.optim.optimizer import build_optimizer
    from prism_megatron.optim.step import train_step

    sizes = read_sizes(checkpoint)
    table = policy_table(sizes)
    policy = build_policy(ModelConfig(hf_checkpoint=str(checkpoint)), parallel, sizes)
    with HFWeights(checkpoint) as weights:
        load_weights(policy, table, weights)
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    image_token = hf.config.image_token_id
    made = sequences(sizes, image_token)
    batch = pack(made, image_token_id=image_token, merge_size=2, pad_to_multiple=tp)

    reference, entropies = hf_logprobs(hf, made, image_token)
    wrapped = wrap_for_training(policy, use_distributed_optimizer=False)
    measured: dict[str, Any] = {}
    with torch.no_grad():
        logits = policy(batch)
        real = batch.sequence_ids < len(made)
        last = torch.cat((batch.cu_seqlens[1:].long() - 1,))
        inner = torch.ones_like(real).index_fill(0, last, False) & real
        logprobs = token_logprobs(logits, batch.targets)
        # Relative to the largest of them: a random model is tens of nats sure, and float32 has seven digits.
        measured["logprob_relative_diff"] = float(
            (logprobs[inner] - reference.detach()).abs().max() / reference.detach().abs().max()
        )
        measured["entropy_abs_diff"] = float((token_entropy(logits)[inner] - entropies).abs().max())
        wider = pack(made, image_token_id=image_token, merge_size=2, pad_to_multiple=64)
        again = token_logprobs(policy(wider), wider.targets)[: len(real)]
        measured["padding_changes_nothing"] = float((again - logprobs)[inner].abs().max())

    def loss(packed: PackedBatch, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -(token_logprobs(logits, packed.targets) * packed.loss_mask).sum() / 100, {}

    # A learning rate of zero: gradients are computed, reduced and left where they are.
    optimizer = build_optimizer(OptimizerConfig(lr=0.0, clip_grad=0.0), wrapped)
    train_step(wrapped, optimizer, [batch], lambda model, packed: model(packed), loss, lr=0.0)
    (-(reference * batch.loss_mask[inner]).sum() / 100).backward()
    theirs = {name: parameter.grad for name, parameter in hf.named_parameters()}
    ours = {name: parameter.main_grad for name, parameter in policy.named_parameters()}
    rank, size = parallel_position()
    relative = {}
    for rule in table:
        if rule.tied:
            continue
        wanted = rule.layout.shard(rule.layout.join([theirs[name] for name in rule.hf]), rank, size)
        relative[rule.megatron] = float((ours[rule.megatron] - wanted).abs().max() / wanted.abs().max())
    measured["worst_gradient"], measured["grad_relative_diff"] = max(relative.items(), key=lambda item: item[1])

    original = dict(hf.named_parameters())
    exported = dict(export_weights(wrapped, table))
    measured["export_identical"] = set(exported) == set(original) and all(
        torch.equal(tensor, original[name]) for name, tensor in exported.items()
    )
    if rank == 0:
        Path(sys.argv[4]).write_text(json.dumps(measured))
    groups.shutdown()


def hf_logprobs(hf: Any, made: list[TrainingSequence], image_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """HF's log-probability of every next token and entropy of every distribution, sequence after sequence."""
    logprobs, entropies = [], []
    for sequence in made:
        ids = torch.tensor([sequence.prompt.token_ids + sequence.response_ids])
        logits = hf(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=sequence.prompt.pixel_values,
            image_grid_thw=sequence.prompt.image_grid_thw,
            mm_token_type_ids=(ids == image_token).int(),
        ).logits[0, :-1]
        log_softmax = logits.log_softmax(-1)
        logprobs.append(log_softmax.gather(1, ids[0, 1:, None])[:, 0])
        entropies.append(-(log_softmax.exp() * log_softmax).sum(-1).detach())
    return torch.cat(logprobs), torch.cat(entropies)


def parallel_position() -> tuple[int, int]:
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


if __name__ == "__main__":
    main()
