"""Training step of HF transformers, for comparison in ``tools/bench/train.py``; FSDP2 on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prism_megatron.config import SFTConfig
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.types import InputSpec


def hf_step(config: SFTConfig, spec: InputSpec, model: Any) -> Callable[[Sequence[TrainingSequence]], float]:
    """Return a step of HF's ``model`` on this rank's padded rows, with gradient clipping and torch's AdamW.

    The loss is the mean over the response tokens of the global batch, like the trainer's.
    """
    from prism_megatron.parallel import groups

    device, settings, world = groups.device(), config.optimizer, dist.get_world_size()
    adam = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    reduced = torch.autocast(device.type, torch.bfloat16, enabled=config.model.precision != "fp32")

    def step(batch: Sequence[TrainingSequence]) -> float:
        local_batch = [batch[i] for i in shard_for_rank(list(range(len(batch))), dist.get_rank(), world)]
        inputs = {name: value.to(device) for name, value in padded(local_batch, spec).items()}
        trained = torch.tensor(sum(len(sequence.response_ids) for sequence in batch) / world)
        adam.zero_grad()
        with reduced:
            loss: Tensor = model(**inputs, num_items_in_batch=trained).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        adam.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        return float(mean)

    return step


def hf_model(config: SFTConfig) -> Any:
    """Load HF's model for training in float32, with the recipe's frozen parts and recomputation."""
    from transformers import AutoModelForImageTextToText

    from prism_megatron.parallel import groups

    model = AutoModelForImageTextToText.from_pretrained(config.model.hf_checkpoint, dtype=torch.float32)
    model.to(groups.device()).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_part_of(name) not in config.model.freeze)
    if config.model.recompute:
        model.gradient_checkpointing_enable()
    if dist.get_world_size() > 1:
        _shard(model, groups.device().type)
    return model


def padded(batch: Sequence[TrainingSequence], spec: InputSpec) -> dict[str, Tensor]:
    """Collate the batch like HF's trainer: padded on the right, prompts masked in the labels."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sequence in enumerate(batch):
        tokens = torch.tensor(sequence.prompt.token_ids + sequence.response_ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, len(sequence.prompt.token_ids) : len(tokens)] = tokens[len(sequence.prompt.token_ids) :]
    visuals = [visual for sequence in batch for visual in sequence.prompt.visuals]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "mm_token_type_ids": (ids == spec.image_token_id).int(),
        "pixel_values": torch.cat([visual.patches for visual in visuals]),
        "image_grid_thw": torch.tensor([visual.grid for visual in visuals]),
    }


def _part_of(name: str) -> str:
    """Return the part (``ModelConfig.freeze``) that an HF parameter belongs to."""
    if "visual." not in name:
        return "language_model"
    return "merger" if "merger" in name else "vision"


def _shard(model: nn.Module, device: str) -> None:
    """Shard the model with FSDP2 over all ranks, one unit per layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[0].endswith((".layers", ".blocks")):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
