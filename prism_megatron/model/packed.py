"""Per-batch input of every layer besides the hidden states: sequence lengths, rotary angles, branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prism_megatron.model.rotary import mrope_cos_sin
from prism_megatron.model.router_stats import RouterStats
from prism_megatron.model.sizes import Rotary
from prism_megatron.parallel.context import context_tokens
from prism_megatron.types import PackedBatch


@dataclass
class PackedContext(PackedSeqParams):
    """Megatron's description of a packed batch, with what the layers of this model need in addition.

    The T' tokens are this rank's: the whole batch, or this rank's part under context parallelism. The sequence lengths
    are always those of the whole batch.

    rope_cos, rope_sin  [T', 1, head_dim], rotary angles of each token
    token_index         [T'] int64 or None: index of each token in the whole batch (context parallelism only)
    token_order         [T] int64 or None: index of each token of the batch in the concatenation of all ranks' parts
    token_branch        [T'] int64: 0 perception (and all tokens of a policy), 1 reasoning, -1 padding
    prefix              [N] int64 or None: the sequence that each sequence continues, -1 for none
    output_tokens       [N] int64 or None: the only tokens whose hidden states the last layer must compute
    token_share         the micro-batch's fraction of the global batch's tokens, weight of its load-balancing loss
    router_stats        collects the routers' statistics in a training step, or None
    """

    rope_cos: Tensor | None = None
    rope_sin: Tensor | None = None
    token_index: Tensor | None = None
    token_order: Tensor | None = None
    token_branch: Tensor | None = None
    prefix: Tensor | None = None
    output_tokens: Tensor | None = None
    token_share: float = 0.0
    router_stats: RouterStats | None = None


def packed_context(
    batch: PackedBatch,
    config: TransformerConfig,
    rotary: Rotary,
    token_share: float,
    output_tokens: Tensor | None = None,
    router_stats: RouterStats | None = None,
) -> PackedContext:
    """Build the context of this rank's part of ``batch``.

    Args:
        batch: The whole packed batch.
        config: Gives the context-parallel size and the head dimension.
        rotary: Rotary settings of the language model.
        token_share: The micro-batch's fraction of the global batch's tokens.
        output_tokens: The only tokens whose hidden states the last layer must compute, [N].
        router_stats: Collects the routers' statistics in a training step.
    """
    branches = batch.branch_ids if batch.branch_ids is not None else torch.zeros_like(batch.last_tokens)
    branch_of_sequence = torch.cat((branches, branches.new_full((1,), -1)))
    ends = torch.cat((batch.last_tokens, batch.last_tokens.new_full((1,), -1)))
    is_padding = torch.arange(len(batch.tokens), device=ends.device) > ends[batch.sequence_ids]
    token_branch = branch_of_sequence[batch.sequence_ids].masked_fill(is_padding, -1)
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
        output_tokens=output_tokens,
        token_share=token_share,
        router_stats=router_stats,
    )
