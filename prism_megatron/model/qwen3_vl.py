"""Qwen3-VL on Megatron-core: vision tower, interleaved M-RoPE, DeepStack, packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from prism_megatron.model.layer_spec import PackedContext, packed_context
from prism_megatron.model.rotary import mrope_cos_sin
from prism_megatron.model.vision import VisionSizes, VisionTower
from prism_megatron.types import PackedBatch


@dataclass(frozen=True)
class TextSizes:
    """What the language model needs beside Megatron's TransformerConfig."""

    vocab_size: int
    rotary_base: float
    mrope_section: tuple[int, int, int]
    tie_embeddings: bool


class DeepStackBlock(TransformerBlock):
    """Megatron's decoder, adding DeepStack level ``i`` to the visual tokens after layer ``i``."""

    def forward(self, hidden_states: Tensor, deepstack: Tensor, context: PackedContext) -> Tensor:  # type: ignore[override]
        """hidden_states [T, 1, H] (sequence shard under sequence parallelism), deepstack [D, T, 1, H] likewise."""
        recompute = self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):

            def run(hidden: Tensor, layer: MegatronModule = layer) -> Tensor:
                output: Tensor = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=context)[0]
                return output

            hidden_states = tensor_parallel.checkpoint(run, False, hidden_states) if recompute else run(hidden_states)
            if index < len(deepstack):
                hidden_states = hidden_states + deepstack[index]
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
        return make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)


class Qwen3VL(LanguageModule):
    """The policy. ``forward`` gives vocabulary-parallel logits; ``hidden_states`` stops before the output layer."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        text_sizes: TextSizes,
        vision_sizes: VisionSizes,
        spec: TransformerBlockSubmodules,
        with_output_layer: bool = True,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = True, True
        self.share_embeddings_and_output_weights = text_sizes.tie_embeddings
        self.text_sizes = text_sizes
        self.vision = VisionTower(vision_config, vision_sizes)
        self.embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=text_sizes.vocab_size,
            max_sequence_length=0,
            position_embedding_type="none",
            scatter_to_sequence_parallel=False,
        )
        self.decoder = DeepStackBlock(config=config, spec=spec)
        self.output_layer = None
        if with_output_layer:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                text_sizes.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=text_sizes.tie_embeddings,
            )
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """Part of Megatron's pipeline contract; with one stage there is nothing to receive."""

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Final normalised hidden states, [T, 1, H] (this rank's T / tp tokens under sequence parallelism)."""
        embedded = self.embedding(batch.tokens[None], position_ids=None)  # [T, 1, H]
        if batch.pixel_values.numel():
            features, deepstack = self.vision(batch.pixel_values, batch.image_grid_thw)
            embedded, deepstack = _place_visual_tokens(embedded, features, deepstack, batch.visual_index)
        else:
            deepstack = embedded.new_zeros(0)
        if self.config.sequence_parallel:
            embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded)
            deepstack = [tensor_parallel.scatter_to_sequence_parallel_region(level) for level in deepstack]
        return self.decoder(embedded, deepstack, self._context(batch))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits over this rank's part of the vocabulary, [T, 1, V / tp]."""
        assert self.output_layer is not None
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits: Tensor = self.output_layer(self.hidden_states(batch), weight=weight)[0]
        return logits

    def _context(self, batch: PackedBatch) -> PackedContext:
        cos, sin = mrope_cos_sin(
            batch.position_ids,
            self.config.kv_channels,
            self.text_sizes.rotary_base,
            list(self.text_sizes.mrope_section),
        )
        return packed_context(batch.cu_seqlens, batch.max_seqlen, cos, sin)


def _place_visual_tokens(
    embedded: Tensor, features: Tensor, deepstack: Tensor, visual_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Put visual features [V, H] where ``visual_index`` [T] points, and spread DeepStack [D, V, H] to [D, T, 1, H].

    One image may be pointed at from many sequences: it was encoded once, and its gradient sums over them.
    """
    visual = (visual_index >= 0)[:, None, None]
    row = visual_index.clamp(min=0)
    embedded = torch.where(visual, features[row][:, None], embedded)
    return embedded, deepstack[:, row][:, :, None] * visual
