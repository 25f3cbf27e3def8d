"""Which building blocks a layer is made of: Transformer Engine on CUDA, our own few on a CPU.

The two sets give the same parameter names (norms are never fused into the linear after them), so weights and
checkpoints move between them untouched.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
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

from prism_megatron.model.attention import PackedSDPA
from prism_megatron.model.rms_norm import rms_norm
from prism_megatron.model.rotary import rotate
from prism_megatron.model.router import BranchRouter, RoutedLayer


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
