"""Log-probabilities of given tokens from vocabulary-parallel logits."""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) in nats, [T] float32 with gradient, from logits [T, 1, V / tp] and targets [T]."""
    # Megatron's kernel works in place on its input, so it gets its own copy.
    nll = tensor_parallel.vocab_parallel_cross_entropy(logits.float().clone(), targets[:, None])
    return -nll[:, 0]


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution in nats, [T], from logits [T, 1, V / tp]."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = logits[:, 0].float()
    peak = logits.max(-1).values
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
    exp = (logits - peak[:, None]).exp()
    sums = torch.stack((exp.sum(-1), (exp * (logits - peak[:, None])).sum(-1)))
    torch.distributed.all_reduce(sums, group=group)
    return sums[0].log() - sums[1] / sums[0]
