"""Qwen3-VL's vision tower: image patches to merged visual tokens and DeepStack features.

Attention heads and MLP columns are split over the tensor-parallel ranks, patches are replicated. Images are packed, and
each attends only to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from prism_megatron.model.layer_spec import spec_provider
from prism_megatron.model.rotary import rotate, vision_cos_sin

_NORM_EPS = 1e-6  # fixed by the architecture, not in config.json
_ROTARY_BASE = 10000.0  # fixed, too


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the vision tower that are not in Megatron's TransformerConfig."""

    depth: int
    patch_dim: int
    merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_layers: tuple[int, ...]


class ShardedModules(nn.ModuleList):
    """A module list that Megatron checkpoints shard by shard.

    Megatron takes the parameters of a plain list for replicated ones, and would save the first rank's shard only.
    """

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            state.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata))
        return state


class VisionTower(MegatronModule):
    """Vision transformer with a merger, and a DeepStack merger at some of its layers."""

    def __init__(self, config: TransformerConfig, sizes: VisionSizes) -> None:
        super().__init__(config=config)
        self.sizes = sizes
        dtype = config.params_dtype
        self.patch_embed = nn.Linear(sizes.patch_dim, config.hidden_size, dtype=dtype)
        self.pos_embed = nn.Embedding(sizes.num_position_embeddings, config.hidden_size, dtype=dtype)
        self.layers = ShardedModules(VisionLayer(config, number + 1) for number in range(sizes.depth))
        self.merger = PatchMerger(config, sizes, normalise_merged=False)
        self.deepstack_mergers = ShardedModules(
            PatchMerger(config, sizes, normalise_merged=True) for _ in sizes.deepstack_layers
        )

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """Encode patches [P, patch_dim] of images with sizes ``grid_thw`` [images, 3], in patches.

        Returns:
            Merged visual tokens [V, H] and the DeepStack levels [D, V, H].
        """
        rows, columns = patch_coordinates(grid_thw, self.sizes.merge_size)
        hidden = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        hidden = hidden + self._position_embedding(grid_thw, rows, columns)
        cos, sin = vision_cos_sin(rows, columns, self.config.kv_channels, _ROTARY_BASE)
        frames = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        cu_seqlens = F.pad(frames.cumsum(0), (1, 0)).int()
        longest = int(frames.max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        deepstack: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, sin, packed)
            if index in self.sizes.deepstack_layers:
                deepstack.append(self.deepstack_mergers[self.sizes.deepstack_layers.index(index)](hidden))
        return self.merger(hidden), torch.stack(deepstack)

    def _position_embedding(self, grid_thw: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Resample the learned square grid of position embeddings bilinearly to each image's grid, [P, hidden]."""
        side = int(self.sizes.num_position_embeddings**0.5)
        patches = grid_thw.prod(1)
        indices: list[Tensor] = []
        weights: list[Tensor] = []
        for index, size in ((rows, grid_thw[:, 1]), (columns, grid_thw[:, 2])):
            steps = torch.repeat_interleave((size - 1).clamp(min=1), patches)
            source = index.float() * (side - 1) / steps
            below = source.floor()
            indices.append(torch.stack((below, below + 1), 1).long().clamp(max=side - 1))
            weights.append(torch.stack((1 - (source - below), source - below), 1))
        table_index = (indices[0][:, :, None] * side + indices[1][:, None]).flatten(1)
        weight = (weights[0][:, :, None] * weights[1][:, None]).flatten(1)
        return (self.pos_embed(table_index) * weight[..., None].to(self.pos_embed.weight.dtype)).sum(1)


class VisionLayer(MegatronModule):
    """Pre-norm attention and MLP with residual connections: [P, hidden] -> [P, hidden]."""

    def __init__(self, config: TransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS, dtype=config.params_dtype)
        self.attention = VisionAttention(config, layer_number)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS, dtype=config.params_dtype)
        self.linear_fc1 = _column_parallel(config, config.hidden_size, config.ffn_hidden_size)
        self.linear_fc2 = _row_parallel(config, config.ffn_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, packed: PackedSeqParams) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden), cos, sin, packed)
        expanded = F.gelu(self.linear_fc1(self.norm2(hidden))[0], approximate="tanh")
        projected: Tensor = self.linear_fc2(expanded)[0]
        return hidden + projected


class VisionAttention(MegatronModule):
    """Full attention within each image, heads split over the tensor-parallel ranks.

    The rows of ``linear_qkv`` are ordered by head (q, k, v of head 0, then of head 1, ...), so that tensor-parallel
    ranks split it by head.
    """

    def __init__(self, config: TransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        self.head_dim = config.kv_channels
        self.linear_qkv = _column_parallel(config, config.hidden_size, 3 * config.hidden_size)
        self.core_attention = spec_provider(config).core_attention()(
            config, layer_number=layer_number, attn_mask_type=AttnMaskType.padding, attention_type="self"
        )
        self.linear_proj = _row_parallel(config, config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, packed: PackedSeqParams) -> Tensor:
        qkv = self.linear_qkv(hidden)[0].unflatten(-1, (-1, 3, self.head_dim))
        query, key, value = qkv.unbind(2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = self.core_attention(
            query, key, value.contiguous(), None, attn_mask_type=AttnMaskType.padding, packed_seq_params=packed
        )
        projected: Tensor = self.linear_proj(attended.reshape(len(hidden), -1))[0]
        return projected


class PatchMerger(MegatronModule):
    """Merges each block of merge_size x merge_size patches into one visual token: [P, hidden] -> [V, H]."""

    def __init__(self, config: TransformerConfig, sizes: VisionSizes, normalise_merged: bool) -> None:
        super().__init__(config=config)
        self.merged_size = config.hidden_size * sizes.merge_size**2
        self.normalise_merged = normalise_merged
        norm_size = self.merged_size if normalise_merged else config.hidden_size
        self.norm = nn.LayerNorm(norm_size, eps=_NORM_EPS, dtype=config.params_dtype)
        self.linear_fc1 = _column_parallel(config, self.merged_size, self.merged_size)
        self.linear_fc2 = _row_parallel(config, self.merged_size, sizes.out_hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.normalise_merged:
            hidden = self.norm(hidden.view(-1, self.merged_size))
        else:
            hidden = self.norm(hidden).view(-1, self.merged_size)
        merged: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(hidden)[0]))[0]
        return merged


def patch_coordinates(grid_thw: Tensor, merge_size: int) -> tuple[Tensor, Tensor]:
    """Return row and column of every patch, [P] each; patches are ordered by frame, then by merge block."""
    rows, columns = [], []
    for t, h, w in grid_thw.tolist():
        blocks = (h // merge_size, merge_size, w // merge_size, merge_size)
        row = torch.arange(h, device=grid_thw.device)[:, None].expand(h, w).reshape(blocks)
        column = torch.arange(w, device=grid_thw.device).expand(h, w).reshape(blocks)
        rows.append(row.transpose(1, 2).flatten().repeat(t))
        columns.append(column.transpose(1, 2).flatten().repeat(t))
    return torch.cat(rows), torch.cat(columns)


def _column_parallel(config: TransformerConfig, in_size: int, out_size: int) -> Any:
    return spec_provider(config).column_parallel_linear()(
        in_size,
        out_size,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=True,
        skip_bias_add=False,
        is_expert=False,
    )


def _row_parallel(config: TransformerConfig, in_size: int, out_size: int) -> Any:
    return spec_provider(config).row_parallel_linear()(
        in_size,
        out_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
    )
