"""Attention over packed sequences on a CPU: each attends to itself and its prefix only, in gradients too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

BOUNDS = (0, 3, 7, 9, 14, 18)
NO_PREFIX, PREFIXES = (
    (-1,) * 5,
    (-1, 0, -1, 0, 2),
)  # one of 4 and one of 5 tokens continue the first, the last continues the third


def by_mask(query: Tensor, key: Tensor, value: Tensor, prefix: Sequence[int]) -> Tensor:
    """Attend over the whole batch with a mask that leaves a token's own past and its prefix."""
    part = torch.tensor([number for number in range(5) for _ in range(BOUNDS[number + 1] - BOUNDS[number])])
    visible = (part[:, None] == part) | (torch.tensor(prefix)[part][:, None] == part)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.tril(), enable_gqa=True)
    return attended.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("prefix", [NO_PREFIX, PREFIXES])
def test_packed_sequences_equal_one_masked_batch(prefix: Sequence[int]) -> None:
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
    expected = by_mask(*inputs, prefix)
    weight = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = attention(*inputs, None, AttnMaskType.padding_causal, packed)
        ours = torch.autograd.grad((found * weight).sum(), inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, gradients)
    # The gradient of a slice is as long as the batch; one per sequence took a fifth of a step.
    assert "aten::slice_backward" not in {event.key for event in profiler.key_averages()}


def test_a_sequence_that_is_not_finite_changes_no_other() -> None:
    """Two sequences of different length continue the first, so that the shorter one is padded."""
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
