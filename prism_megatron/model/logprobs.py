"""Log-probabilities and entropies of tokens over a vocabulary that is split over tensor-parallel ranks.

Logits exist for a few tokens at a time, in float32, and are computed again in the backward pass: for an 8K-token
response and Qwen's vocabulary all of them would take gigabytes, while the result is two numbers per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 25  # logits at a time on a rank: 128 MiB


class TokenScores(NamedTuple):
    """log p(target), with gradient, and entropy of the predicted distribution; [T] float32 each, in nats."""

    logprobs: Tensor
    entropy: Tensor


def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, padding: int = 0) -> TokenScores:
    """Compute log-probability and entropy of S tokens.

    The gradient of ``hidden`` is this rank's part of a sum over the tensor-parallel ranks; Megatron's mappings sum it.

    Args:
        hidden: Final hidden states [S, H].
        weight: This rank's rows of the output layer, [V / tp, H].
        targets: Target tokens [S].
        padding: The last rows of ``weight`` that are no tokens; all ranks have the same number of rows.
    """
    return TokenScores(*_TokenScores.apply(hidden, weight, targets, padding))


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        local, is_local = _local_targets(targets, len(weight), padding, group)
        ctx.padding, weight = padding, weight[: len(weight) - padding]
        chosen, log_sum, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for part in _chunks(len(hidden), len(weight)):
            logits = (hidden[part] @ weight.T).float()
            peak = logits.max(-1).values
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            shifted = logits - peak[:, None]
            exp = shifted.exp()
            target = shifted.gather(1, local[part, None])[:, 0] * is_local[part]
            sums = torch.stack((exp.sum(-1), (exp * shifted).sum(-1), target))
            dist.all_reduce(sums, group=group)
            log_sum_shifted = sums[0].log()
            chosen[part] = sums[2] - log_sum_shifted
            entropy[part] = log_sum_shifted - sums[1] / sums[0]
            log_sum[part] = log_sum_shifted + peak
        ctx.save_for_backward(hidden, weight, local, is_local, log_sum)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        hidden, weight, local, is_local, log_sum = ctx.saved_tensors
        hidden_needed, weight_needed, *_ = ctx.needs_input_grad
        hidden_gradient = torch.empty_like(hidden) if hidden_needed else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if weight_needed else None
        for part in _chunks(len(hidden), len(weight)):
            logits = (hidden[part] @ weight.T).float()
            slope = logits.sub_(log_sum[part, None]).exp_().neg_()  # d log p(target) / d logits = [target] - p
            slope.scatter_add_(1, local[part, None], is_local[part, None].float())
            slope = slope.mul_(gradient[part, None]).to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = slope @ weight
            if weight_gradient is not None:
                weight_gradient += slope.T @ hidden[part]
        if weight_gradient is not None:
            weight_gradient = F.pad(weight_gradient, (0, 0, 0, ctx.padding)).to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None


def _local_targets(targets: Tensor, rows: int, padding: int, group: Any) -> tuple[Tensor, Tensor]:
    """Return each target's row in this rank's part of the vocabulary, clamped, and whether it is in that part."""
    local = targets - group.rank() * rows
    is_local = (local >= 0) & (local < rows - padding)
    return local.clamp(0, rows - padding - 1), is_local


def _chunks(tokens: int, rows: int) -> list[slice]:
    size = max(_CHUNK_ELEMENTS // rows, 1)
    return [slice(start, start + size) for start in range(0, tokens, size)]
