"""What travels beside the hidden states: the lengths, angles and branches of a packed batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prism_megatron.model.rotary import mrope_cos_sin
from prism_megatron.model.sizes import Rotary
from prism_megatron.parallel.context import context_tokens
from prism_megatron.types import PackedBatch


@dataclass
class PackedContext(PackedSeqParams):
    """What every layer needs to know about a packed batch, beside its hidden states.

    The T' tokens are this rank's: all of the batch's, or its part under context parallelism. The sequence lengths are
    always those of the whole batch.

    rope_cos, rope_sin  [T', 1, head_dim], the angles of each token
    token_index         [T'] int64 or None: where each token stands in the whole batch (context parallelism only)
    token_order         [T] int64 or None: where each token of the batch is among all ranks' parts laid end to end
    token_branch        [T'] int64: 0 perception (and everything of a policy), 1 reasoning, -1 padding
    prefix              [N] int64 or None: the sequence that each one goes on from, -1 for none
    read                [N] int64 or None: the only tokens whose hidden states the last layer need give
    token_share         this micro-batch's part of the global batch's tokens (weight of its load-balancing loss)
    load_balance        what each router's load-balancing loss was, detached, for the log
    routing             and [2, E + 2] of each branch: tokens sent to each expert, summed entropy, number of tokens
    """

    rope_cos: Tensor | None = None
    rope_sin: Tensor | None = None
    token_index: Tensor | None = None
    token_order: Tensor | None = None
    token_branch: Tensor | None = None
    prefix: Tensor | None = None
    read: Tensor | None = None
    token_share: float = 0.0
    load_balance: list[Tensor] = field(default_factory=list)
    routing: list[Tensor] = field(default_factory=list)


def packed_context(
    batch: PackedBatch,
    config: TransformerConfig,
    rotary: Rotary,
    token_share: float,
) -> PackedContext:
    """The context of this rank's part of ``batch``; ``token_share`` is the micro-batch's part of the global batch."""
    branches = batch.branch_ids if batch.branch_ids is not None else torch.zeros_like(batch.last_tokens)
    with_padding = torch.cat((branches, branches.new_full((1,), -1)))
    ends = torch.cat((batch.last_tokens, batch.last_tokens.new_full((1,), -1)))
    behind = torch.arange(len(batch.tokens), device=ends.device) > ends[batch.sequence_ids]
    token_branch = with_padding[batch.sequence_ids].masked_fill(behind, -1)
    position_ids = batch.position_ids
    index = order = None
    if (size := config.context_parallel_size) > 1:
        parts = [context_tokens(batch.cu_seqlens, rank, size) for rank in range(size)]
        index, order = parts[parallel_state.get_context_parallel_rank()], torch.cat(parts).argsort()
        position_ids, token_branch = position_ids[:, index], token_branch[index]
    cos, sin = mrope_cos_sin(position_ids, config.kv_channels, rotary)
    return PackedContext(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=batch.cu_seqlens,
        cu_seqlens_kv_padded=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        rope_cos=cos,
        rope_sin=sin,
        token_index=index,
        token_order=order,
        token_branch=token_branch,
        prefix=batch.prefix,
        token_share=token_share,
    )
