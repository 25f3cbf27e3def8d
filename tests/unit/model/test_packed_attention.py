"""Attention over packed sequences on a CPU: each sees itself and its prefix, and no gradient is longer than that."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

BOUNDS = (0, 3, 7, 9, 14, 18)
ALONE, GOING_ON = (
    (-1,) * 5,
    (-1, 0, -1, 0, 2),
)  # one of 4 and one of 5 tokens go on from the first, the last from the third


def by_mask(query: Tensor, key: Tensor, value: Tensor, prefix: Sequence[int]) -> Tensor:
    """The whole batch at once, everything but a token's own past and that of its prefix masked."""
    part = torch.tensor([number for number in range(5) for _ in range(BOUNDS[number + 1] - BOUNDS[number])])
    seen = (part[:, None] == part) | (torch.tensor(prefix)[part][:, None] == part)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen.tril(), enable_gqa=True)
    return attended.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("prefix", [ALONE, GOING_ON])
def test_packed_sequences_attend_as_under_one_mask(prefix: Sequence[int]) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from prism_megatron.model.attention import PackedSDPA

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    attention = PackedSDPA(config, 1, AttnMaskType.padding_causal, "self")
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(BOUNDS))
    packed.prefix = torch.tensor(prefix) if max(prefix) >= 0 else None
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(18, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    wanted = by_mask(*inputs, prefix)
    weight = torch.randn(wanted.shape, generator=generator)
    gradients = torch.autograd.grad((wanted * weight).sum(), inputs)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = attention(*inputs, None, AttnMaskType.padding_causal, packed)
        ours = torch.autograd.grad((found * weight).sum(), inputs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours, gradients)
    # A slice's gradient is as long as the batch: as many of them as there are sequences took a fifth of a step.
    assert "aten::slice_backward" not in {event.key for event in profiler.key_averages()}


def test_a_sequence_that_is_not_finite_spoils_no_other() -> None:
    """The last of two that go on from the first is longer, and the one before it padded to its length."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from prism_megatron.model.attention import PackedSDPA

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    attention = PackedSDPA(config, 1, AttnMaskType.padding_causal, "self")
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor((0, 3, 7, 12)))
    packed.prefix = torch.tensor((-1, 0, 0))
    inputs = [torch.randn(12, heads, 8, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2)]
    for one in inputs:
        one[7] = torch.nan
    found = attention(*inputs, None, AttnMaskType.padding_causal, packed)
    assert found[:7].isfinite().all()
    assert found[7:].isnan().all()
