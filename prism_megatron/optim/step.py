"""Optimizer steps and evaluation over micro-batches, with Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from prism_megatron.parallel.collectives import from_last_stage, max_over_data_parallel, sum_over_data_parallel


@dataclass(frozen=True)
class Stats:
    """Detached scalars of a micro-batch to log: ``sums`` and ``maxima`` over the global batch."""

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor] = field(default_factory=dict)


def train_step[Microbatch, Output](
    chunks: Sequence[DistributedDataParallel],
    optimizer: Any,
    microbatches: Sequence[Microbatch],
    forward: Callable[[Any, Microbatch], Output],
    loss: Callable[[Microbatch, Output], tuple[Tensor, Stats]],
    lr: float,
) -> tuple[dict[str, float], float]:
    """Sum the gradients of all micro-batches over the data-parallel ranks, clip them and update the parameters.

    Args:
        chunks: This rank's model chunks.
        optimizer: Their optimizer.
        microbatches: This rank's micro-batches; every data-parallel rank has the same number.
        forward: Runs a chunk on a micro-batch.
        loss: Takes the last chunk's output and returns the loss, normalised over the global batch (``loss/reduce.py``),
            and its statistics.
        lr: The learning rate.

    Returns:
        The sums and maxima over the global batch and the gradient norm before clipping, on every rank.

    Raises:
        FloatingPointError: A gradient is not finite. The parameters are not updated.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    for chunk in chunks:
        chunk.zero_grad_buffer()
        chunk.train()
    optimizer.zero_grad()
    config = chunks[0].config
    config.finalize_model_grads_func = _sum_gradients
    config.grad_scale_func = optimizer.scale_loss
    collected = _run(chunks, microbatches, forward, partial(_with_token_count, loss), forward_only=False)
    stepped, grad_norm, _ = optimizer.step()
    if not stepped or not torch.isfinite(torch.tensor(grad_norm)):
        raise FloatingPointError(
            f"gradient norm is {grad_norm}, and the first gradient not finite is that of {_first_not_finite(chunks)}; "
            "the step is refused. Lower optimizer.lr, or look at this iteration's data"
        )
    return _reduced(collected), float(grad_norm)


def _first_not_finite(chunks: Sequence[DistributedDataParallel]) -> str:
    """Return the name of a parameter of this rank whose gradient is not finite."""
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.main_grad).all()):
                return str(name)
    return "a parameter of another rank"


@torch.no_grad()
def evaluate_step[Microbatch](
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    forward: Callable[[Any, Microbatch], Tensor],
) -> list[Tensor]:
    """Return the last chunk's output for every micro-batch, on every pipeline stage, without gradient and dropout."""
    for chunk in chunks:
        chunk.eval()

    def return_output(_: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return output.new_zeros(()), torch.ones((), dtype=torch.int, device=output.device), output

    outputs: list[Tensor] = _run(chunks, microbatches, forward, return_output, forward_only=True)
    return from_last_stage(outputs)


def _run[Microbatch](
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    forward: Callable[[Any, Microbatch], Any],
    finish: Callable[[Microbatch, Any], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run Megatron's schedule over all micro-batches.

    Args:
        chunks: This rank's model chunks.
        microbatches: This rank's micro-batches.
        forward: Runs a chunk on a micro-batch.
        finish: Takes a micro-batch and the last chunk's output; returns the loss, a token count and anything else.
        forward_only: Compute no gradients.

    Returns:
        The third value of ``finish`` for every micro-batch; on other than the last pipeline stage an empty list.
    """

    def forward_step(iterator: Any, chunk: Any) -> tuple[Any, Callable[[Any], Any]]:
        microbatch = next(iterator)
        return forward(chunk, microbatch), partial(finish, microbatch)

    several = len(chunks) > 1
    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks] if several else iter(microbatches),
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=1,  # not used: with variable lengths the stages send each tensor's shape
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return collected


def _reduced(collected: Sequence[Stats]) -> dict[str, float]:
    """Reduce the last stage's statistics over its micro-batches and the data-parallel ranks, for every rank."""
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for stats in collected:
        for name, value in stats.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in stats.maxima.items():
            maxima[name] = max(maxima.get(name, -float("inf")), float(value))
    if collected:
        totals = sum_over_data_parallel(*sums.values())
        sums = dict(zip(sums, totals, strict=True))
        maxima = {name: max_over_data_parallel(value) for name, value in maxima.items()}
    return from_last_stage(sums | maxima)


def _with_token_count[Microbatch, Output](
    loss: Callable[[Microbatch, Output], tuple[Tensor, Stats]], microbatch: Microbatch, output: Output
) -> tuple[Tensor, Tensor, Stats]:
    value, stats = loss(microbatch, output)
    # Megatron divides by the token count; it is 1, since the loss weights contain the normalisation.
    return value, torch.ones((), dtype=torch.int, device=value.device), stats


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)
