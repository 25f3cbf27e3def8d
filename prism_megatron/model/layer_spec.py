"""Module specs of the decoder: Transformer Engine's modules on a GPU, Megatron's local ones and two of ours on a CPU.

Both give the same parameter names (norms are never fused into the linear layer after them), so checkpoints fit both.
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
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from prism_megatron.model.attention import PackedSDPA
from prism_megatron.model.rms_norm import rms_norm
from prism_megatron.model.rotary import rotate
from prism_megatron.model.router import BranchMoELayer, BranchRouter, RoutedLayer


class RotaryAttention(MegatronModule):
    """Core attention with rotary embedding by the angles of each token in the :class:`PackedContext`.

    Megatron's own packed rotary embedding restarts positions at every sequence, which is wrong for M-RoPE.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.inner = spec_provider(config).core_attention()(config, *args, **kwargs)

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
    """Megatron's local modules, with a norm for sequence parallelism and attention over packed sequences."""

    def layer_norm(self, *args: Any, **kwargs: Any) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedSDPA


def spec_provider(config: TransformerConfig) -> BackendSpecProvider:
    """Return the CPU modules if the model is built on a CPU, Transformer Engine's otherwise."""
    if config.use_cpu_initialization:
        return CPUSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def decoder_block_spec(
    config: TransformerConfig, num_layers: int, branch_groups: int, ends_model: bool
) -> TransformerBlockSubmodules:
    """Describe this rank's ``num_layers`` decoder layers, dense or mixture-of-experts.

    Args:
        config: Megatron's configuration of the language model.
        num_layers: Layers of this pipeline stage or virtual stage.
        branch_groups: Into how many groups the experts are split, each for tokens of one branch.
        ends_model: The last of these layers is the model's last one.
    """
    modules = spec_provider(config)
    norm = modules.layer_norm(rms_norm=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.padding_causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.column_parallel_linear(),
            core_attention=RotaryAttention,
            linear_proj=modules.row_parallel_linear(),
            q_layernorm=modules.layer_norm(rms_norm=True, for_qk=True),
            k_layernorm=modules.layer_norm(rms_norm=True, for_qk=True),
        ),
    )
    submodules = partial(
        TransformerLayerSubmodules,
        input_layernorm=norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp_bda=get_bias_dropout_add,
    )
    linear_layers = MLPSubmodules(linear_fc1=modules.column_parallel_linear(), linear_fc2=modules.row_parallel_linear())
    if config.num_moe_experts is None:
        mlp = partial(MLP.as_mlp_submodule, submodules=linear_layers)
        specs = [ModuleSpec(module=TransformerLayer, submodules=submodules(mlp=mlp))] * num_layers
    else:
        experts = modules.grouped_mlp_modules(config.moe_grouped_gemm)
        router = partial(BranchRouter, branch_groups=branch_groups)
        mlp = partial(BranchMoELayer, submodules=MoESubmodules(experts=experts, router=router))
        specs = [
            ModuleSpec(
                module=RoutedLayer,
                params={"is_last": ends_model and number == num_layers - 1},
                submodules=submodules(mlp=mlp),
            )
            for number in range(num_layers)
        ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
