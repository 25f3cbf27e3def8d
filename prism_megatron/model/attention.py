"""Attention over packed sequences without Transformer Engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prism_megatron.model.packed import PackedContext
from prism_megatron.parallel.context import gather_sequence

_MAX_PADDING = 1.5  # padded over real length, for a sequence in a batch with longer ones


class PackedSDPA(MegatronModule):
    """Scaled dot-product attention over packed sequences, one at a time.

    A sequence with a prefix, another sequence that it continues, attends to all of it; sequences with the same prefix
    run as batches. Under context parallelism keys and values are gathered, and a rank's queries attend to earlier ones.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the arguments that Megatron gives every core attention.

        Args:
            config: Gives the context-parallel size.
            layer_number: Not used.
            attn_mask_type: Causal, or full attention within each sequence.
            attention_type: Not used; it is always "self".
            softmax_scale: Scale of the scores, None for 1 / sqrt(d).
            kwargs: Not used.
        """
        super().__init__(config=config)
        self.causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: [T', heads, d].
            key: [T', groups, d].
            value: [T', groups, d].
            attention_mask: Not used.
            attn_mask_type: Not used; part of Megatron's interface, like the mask.
            packed_seq_params: The sequence lengths, and prefixes if it is a :class:`PackedContext`.

        Returns:
            [T', heads * d].
        """
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        if self.config.context_parallel_size > 1:
            return self._over_context(query, key, value, bounds, packed_seq_params)
        if (prefix := getattr(packed_seq_params, "prefix", None)) is not None:
            return self._after_prefixes(query, key, value, bounds, prefix.tolist())
        # Split, not sliced: the gradient of a slice is as long as the whole batch, padded with zeros.
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._attend(q[None], k[None], v[None])[0] for q, k, v in parts])

    def _over_context(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], context: PackedSeqParams
    ) -> Tensor:
        """Attend under context parallelism: gather keys and values, then attend sequence by sequence.

        Args:
            query: [T', heads, d], this rank's tokens.
            key: [T', groups, d].
            value: [T', groups, d].
            bounds: Start of each sequence in the whole batch and end of the last, [N + 1].
            context: Gives the positions of this rank's tokens.
        """
        parts = self.config.context_parallel_size
        assert self.causal
        assert isinstance(context, PackedContext)
        assert context.prefix is None
        assert context.token_index is not None
        assert context.token_order is not None
        lengths = [end - start for start, end in pairwise(bounds)]
        group = parallel_state.get_context_parallel_group()
        keys, values = (gather_sequence(x, group)[context.token_order].split(lengths) for x in (key, value))
        queries = query.split([length // parts for length in lengths])
        attended = []
        for number, (start, end) in enumerate(pairwise(bounds)):
            local_tokens = context.token_index[start // parts : end // parts, None]
            mask = local_tokens >= torch.arange(start, end, device=key.device)
            attended.append(self._attend(queries[number][None], keys[number][None], values[number][None], mask)[0])
        return torch.cat(attended)

    def _after_prefixes(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], prefix: Sequence[int]
    ) -> Tensor:
        """Attend with prefixes: sequences that continue the same one run as batches, padded to the longest.

        Padding repeats a sequence's last token and comes after it, where the causal mask hides it: a value that is not
        finite must not reach another sequence through a weight of zero.

        Args:
            query: [T, heads, d].
            key: [T, groups, d].
            value: [T, groups, d].
            bounds: Start of each sequence and end of the last, [N + 1].
            prefix: The sequence that each sequence continues, -1 for none, [N].
        """
        device = query.device
        starts = torch.tensor(bounds, device=device)
        lengths = starts.diff()
        row_of_token = torch.empty(len(query), dtype=torch.long, device=device)  # in the concatenated outputs
        attended, rows = [], 0
        for before, members in _batches(prefix, bounds):
            steps = torch.arange(int(lengths[members].max()), device=device)
            own = starts[members, None] + steps.minimum(lengths[members, None] - 1).clamp(min=0)
            first, end = (bounds[before], bounds[before + 1]) if before >= 0 else (0, 0)
            shared = torch.arange(first, end, device=device).expand(len(members), -1)
            visible = torch.cat((shared, own), dim=1)
            mask = query.new_full((len(steps), visible.shape[1]), float("-inf")).triu(end - first + 1)
            out = self._attend(_rows(query, own), _rows(key, visible), _rows(value, visible), mask)
            attended.append(out.flatten(0, 1))
            real = steps < lengths[members, None]
            row_of_token[own[real]] = rows + real.flatten().nonzero()[:, 0]
            rows += own.numel()
        return torch.cat(attended).index_select(0, row_of_token)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with query [B, L, heads, d], key and value [B, K, groups, d] and mask [L, K]: [B, L, heads * d]."""
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.transpose(1, 2).flatten(2)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Select rows of ``x`` [T, ...] at ``index`` [B, L]: [B, L, ...]. On a CPU it is faster than indexing."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def _batches(prefix: Sequence[int], bounds: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield each prefix (-1 for none) with sequences that continue it, in batches of similar length."""
    after: dict[int, list[int]] = defaultdict(list)
    lengths = [end - start for start, end in pairwise(bounds)]
    for number, before in enumerate(prefix):
        after[before].append(number)
    for before, members in after.items():
        group: list[int] = []
        for number in sorted(members, key=lambda i: -lengths[i]):
            if group and lengths[group[0]] > _MAX_PADDING * lengths[number]:
                yield before, group
                group = []
            group.append(number)
        yield before, group
