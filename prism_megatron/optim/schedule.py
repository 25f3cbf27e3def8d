"""Learning-rate schedule: a pure function of the iteration."""

from __future__ import annotations

import math

from prism_megatron.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, iteration: int, train_iters: int) -> float:
    """Return the learning rate of iteration ``iteration`` (from 0): linear warm-up, then decay to ``min_lr``."""
    warmup = round(config.warmup_fraction * train_iters)
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    progress = (iteration - warmup) / max(train_iters - warmup, 1)
    if config.decay_style == "constant":
        return config.lr
    if config.decay_style == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        assert config.decay_style == "linear"
        remaining = 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining
