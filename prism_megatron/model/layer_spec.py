"""Which building blocks a layer is made of: Transformer Engine on CUDA, our own few on a CPU.

The two sets give the same parameter names (norms are never fused into the linear after them), so weights and
checkpoints move between them untouched.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from prism_megatron.model.packed import PackedContext
from prism_megatron.model.rms_norm import rms_norm
from prism_megatron.model.rotary import rotate
from prism_megatron.model.router import BranchRouter, RoutedLayer
from prism_megatron.parallel.context import gather_sequence


class RotaryAttention(MegatronModule):
    """Core attention that turns queries and keys first.

    Megatron's own packed rotary restarts positions at every sequence, which is wrong for M-RoPE: here each token brings
    its angles along in the :class:`PackedContext`.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.inner = backend().core_attention()(config, *args, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = kwargs["packed_seq_params"]
        query = rotate(query, context.rope_cos, context.rope_sin)
        key = rotate(key, context.rope_cos, context.rope_sin)
        attended: Tensor = self.inner(query, key, value, *args, **kwargs)
        return attended


class PackedSDPA(MegatronModule):
    """Scaled dot-product attention over packed sequences, one after the other, where there is no Transformer Engine.

    A sequence that goes on from another (its prefix) sees all of it. Under context parallelism keys and values are
    gathered, and a rank's queries see those that stand before them.
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
        """query [T', heads, d], key and value [T', groups, d] -> [T', heads * d].

        The mask's type is known already; Transformer Engine's attention asks for it, so this one does.
        """
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        after = getattr(packed_seq_params, "prefix", None)
        prefix = None if after is None else after.tolist()
        parts = self.config.context_parallel_size
        if parts > 1:
            assert self.causal
            assert prefix is None
            assert isinstance(packed_seq_params, PackedContext)
            assert packed_seq_params.token_index is not None
            assert packed_seq_params.token_order is not None
            group = parallel_state.get_context_parallel_group()
            key, value = (gather_sequence(x, group)[packed_seq_params.token_order] for x in (key, value))
        # Split, not sliced: each slice's gradient would be as long as the whole batch, zeros around it.
        lengths = [end - start for start, end in pairwise(bounds)]
        queries = query.split([length // parts for length in lengths])
        all_keys, all_values = key.split(lengths), value.split(lengths)
        attended = []
        for number, (start, end) in enumerate(pairwise(bounds)):
            keys, values, mask = all_keys[number], all_values[number], None
            if parts > 1:
                mine = packed_seq_params.token_index[start // parts : end // parts, None]
                mask = mine >= torch.arange(start, end, device=key.device)
            elif prefix is not None and (before := prefix[number]) >= 0:
                seen = len(all_keys[before])
                keys, values = torch.cat((all_keys[before], keys)), torch.cat((all_values[before], values))
                mask = torch.ones(end - start, len(keys), dtype=torch.bool, device=key.device).tril(seen)
            attended.append(self._attend(queries[number], keys, values, mask))
        return torch.cat(attended)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [L, heads, d], key and value [K, groups, d], mask [L, K] -> [L, heads * d]."""
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended[0].transpose(0, 1).flatten(1)


class RMSNorm(torch.nn.Module):
    """RMS normalisation whose weight gradient is summed over the tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


class CPUSpecProvider(LocalSpecProvider):
    """Megatron's local blocks, with the norm and the attention it lacks without Transformer Engine."""

    def layer_norm(self, *args: Any, **kwargs: Any) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedSDPA


def backend() -> BackendSpecProvider:
    """Transformer Engine where there is a GPU, the CPU blocks otherwise."""
    if torch.cuda.is_available():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return CPUSpecProvider()


def decoder_block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Submodules of a Qwen3-VL decoder with ``num_layers`` layers on this rank, dense or mixture-of-experts."""
    blocks = backend()
    norm = blocks.layer_norm(rms_norm=True)
    if config.num_moe_experts is None:
        layer: type = TransformerLayer
        mlp = partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(
                linear_fc1=blocks.column_parallel_linear(), linear_fc2=blocks.row_parallel_linear()
            ),
        )
    else:
        layer = RoutedLayer
        experts = blocks.grouped_mlp_modules(config.moe_grouped_gemm)
        mlp = partial(MoELayer, submodules=MoESubmodules(experts=experts, router=BranchRouter))
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.padding_causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=blocks.column_parallel_linear(),
            core_attention=RotaryAttention,
            linear_proj=blocks.row_parallel_linear(),
            q_layernorm=blocks.layer_norm(rms_norm=True, for_qk=True),
            k_layernorm=blocks.layer_norm(rms_norm=True, for_qk=True),
        ),
    )
    spec = ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)
