"""Megatron's AdamW over a model wrapped for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from prism_megatron.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, chunks: Sequence[DistributedDataParallel]) -> Any:
    """Build AdamW with decoupled weight decay and gradient-norm clipping over all parallel ranks."""
    dtype = chunks[0].config.params_dtype
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
        ),
        list(chunks),
    )
