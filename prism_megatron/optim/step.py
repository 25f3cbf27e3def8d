"""One optimizer step over micro-batches, and passes without gradient, through Megatron's schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

Stats = dict[str, Tensor]


def train_step[Microbatch](
    model: DistributedDataParallel,
    optimizer: Any,
    microbatches: Sequence[Microbatch],
    forward: Callable[[Any, Microbatch], Tensor],
    loss: Callable[[Microbatch, Tensor], tuple[Tensor, Stats]],
    lr: float,
) -> tuple[Stats, float]:
    """Sum the losses and gradients of all micro-batches over the data-parallel ranks, clip, step.

    ``loss`` returns a scalar whose normalisation is global already (see ``loss/reduce.py``) and sums to log. Returns
    this rank's sums of those, and the gradient norm before clipping. A gradient that is not finite raises
    FloatingPointError, before anything of this step is saved.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    config = model.config
    config.finalize_model_grads_func = _sum_gradients
    config.grad_scale_func = optimizer.scale_loss

    def forward_step(iterator: Any, wrapped: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Stats]]]:
        microbatch = next(iterator)
        return forward(wrapped, microbatch), partial(_with_token_count, loss, microbatch)

    model.train()
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=1,  # sizes vary; the schedule needs them only across pipeline stages
        micro_batch_size=1,
        forward_only=False,
    )
    stepped, grad_norm, _ = optimizer.step()
    if not stepped or not torch.isfinite(torch.tensor(grad_norm)):
        raise FloatingPointError(f"gradient norm is {grad_norm}; lower optimizer.lr or look at this iteration's data")
    sums: Stats = {}
    for stats in collected:
        for name, value in stats.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums, float(grad_norm)


@torch.no_grad()
def evaluate_step[Microbatch](
    model: DistributedDataParallel, microbatches: Sequence[Microbatch], forward: Callable[[Any, Microbatch], Tensor]
) -> list[Tensor]:
    """``forward`` of every micro-batch, without gradient and without dropout."""
    model.eval()
    return [forward(model.module, microbatch) for microbatch in microbatches]


def _with_token_count[Microbatch](
    loss: Callable[[Microbatch, Tensor], tuple[Tensor, Stats]], microbatch: Microbatch, output: Tensor
) -> tuple[Tensor, Tensor, Stats]:
    value, stats = loss(microbatch, output)
    # Megatron wants a token count to divide by; ours is 1, since the normalisation is in the weights.
    return value, torch.ones((), dtype=torch.int, device=value.device), stats


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)
