"""Qwen3-VL on Megatron-core: vision tower, interleaved M-RoPE, DeepStack, packed sequences, any parallel layout.

A model is a list of chunks, one per virtual pipeline stage of this rank. The first chunk of the first stage owns the
vision tower and the embedding, the last of the last stage the output layer. Between chunks travels one tensor,
[T', 1 + D', H]: the hidden states, and the DeepStack features of the levels that are still to be added.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from prism_megatron.model.layer_spec import decoder_block_spec
from prism_megatron.model.logprobs import TokenScores, token_scores
from prism_megatron.model.packed import PackedContext, packed_context
from prism_megatron.model.sizes import Rotary
from prism_megatron.model.vision import VisionSizes, VisionTower
from prism_megatron.parallel.context import gather_sequence, sum_over
from prism_megatron.types import PackedBatch


@dataclass(frozen=True)
class TextSizes:
    """What the language model needs beside Megatron's TransformerConfig."""

    vocab_size: int
    rotary: Rotary
    tie_embeddings: bool


@dataclass(frozen=True)
class ChunkPlace:
    """Where in the pipeline a model chunk stands. ``vp_stage`` is None where there are no virtual stages."""

    is_first: bool
    is_last: bool
    vp_stage: int | None


class DeepStackBlock(TransformerBlock):
    """Megatron's decoder, adding DeepStack level ``i`` to the visual tokens after layer ``i`` of the whole model."""

    def forward(self, hidden_states: Tensor, deepstack: Tensor, context: PackedContext) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """hidden_states [T', 1, H] and the levels still to be added, deepstack [T', D', H]; returns both.

        T' are this rank's tokens: its context-parallel part, and of that its shard under sequence parallelism.
        """
        recompute = self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled()
        # Delayed scaling keeps one history for all layers, the other recipes know nothing beyond a layer.
        delayed = self.config.fp8_recipe == Fp8Recipe.delayed
        with get_fp8_context(self.config) if delayed else nullcontext():
            for layer in self.layers:

                def run(hidden: Tensor, layer: MegatronModule = layer) -> Tensor:
                    with nullcontext() if delayed else get_fp8_context(self.config, layer.layer_number - 1):
                        output: Tensor = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=context)[0]
                    return output

                hidden_states = self._recomputed(run, hidden_states) if recompute else run(hidden_states)
                if deepstack.shape[1]:
                    hidden_states = hidden_states + deepstack[:, :1]
                    deepstack = deepstack[:, 1:]
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
        return hidden_states, deepstack

    def _recomputed(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """``run`` again in the backward pass; only Transformer Engine's own way keeps FP8 scales as they were."""
        if self.config.fp8:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            return te_checkpoint(run, False, tensor_parallel.get_cuda_rng_tracker, self.pg_collection.tp, hidden)
        return tensor_parallel.checkpoint(run, False, hidden)


class Qwen3VL(LanguageModule):
    """The policy, or the chunk of it that this rank's virtual stage holds."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        text_sizes: TextSizes,
        vision_sizes: VisionSizes,
        place: ChunkPlace,
        with_output_layer: bool = True,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = place.is_first, place.is_last, place.vp_stage
        self.share_embeddings_and_output_weights = text_sizes.tie_embeddings and with_output_layer
        self.text_sizes = text_sizes
        self.last_context: PackedContext | None = None
        self._received: Tensor | None = None
        # A row more on some ranks where they do not divide the vocabulary: no token, and no part of any sum.
        rows = -(-text_sizes.vocab_size // config.tensor_model_parallel_size)
        self.padding = max((parallel_state.get_tensor_model_parallel_rank() + 1) * rows - text_sizes.vocab_size, 0)
        assert self.padding < rows, "a rank without a token"
        if place.is_first:
            self.vision = VisionTower(vision_config, vision_sizes)
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=rows * config.tensor_model_parallel_size,
                max_sequence_length=0,
                position_embedding_type="none",
                scatter_to_sequence_parallel=False,
            )
        self.decoder = DeepStackBlock(
            config=config,
            spec=decoder_block_spec(config, get_num_layers_to_build(config, place.vp_stage)),
            pre_process=place.is_first,
            post_process=place.is_last,
            vp_stage=place.vp_stage,
        )
        if with_output_layer and place.is_last:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                rows * config.tensor_model_parallel_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=text_sizes.tie_embeddings and place.is_first,
            )
        if with_output_layer:
            self.setup_embeddings_and_output_layer()

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero the rows of the vocabulary's matrices that are no tokens."""
        for name, parameter in self.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter[len(parameter) - self.padding :] = 0

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """What the stage before sent, from Megatron's pipeline schedule."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self, batch: PackedBatch, token_share: float = 0.0, whole_logits: bool = False, temperature: float = 1.0
    ) -> Tensor | TokenScores:
        """One chunk's work on a micro-batch.

        The last chunk gives the scores of the trained tokens at ``temperature``, zero elsewhere ([T], on every
        context-parallel rank), or with ``whole_logits`` the logits [T, V] in float32; any other gives the tensor for
        the next. ``token_share`` is the micro-batch's part of the global batch's tokens.
        """
        hidden, deepstack, context = self._decode(batch, token_share)
        if not self.post_process:
            return to_next_stage(hidden, deepstack)
        hidden = self._whole_shard(hidden)
        weight = self._output_weight()
        if whole_logits:
            return self._logits(hidden, weight, context)
        index = context.token_index
        mask, targets = (x if index is None else x[index] for x in (batch.loss_mask, batch.targets))
        (trained,) = mask.nonzero(as_tuple=True)
        scores = token_scores(hidden[trained] / temperature, weight, targets[trained], self.padding)
        place = trained if index is None else index[trained]
        return TokenScores(*(self._spread(values, place, len(batch.tokens)) for values in scores))

    def _decode(
        self, batch: PackedBatch, token_share: float, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor, PackedContext]:
        """Hidden states [T', 1, H] after this chunk's layers, DeepStack levels left over, and the context.

        With ``read`` [N] the last layer gives no others than those of these tokens, [N, 1, H].
        """
        context = packed_context(batch, self.config, self.text_sizes.rotary, token_share)
        context.read = read
        self.last_context = context
        if self.pre_process:
            hidden, deepstack = self._embed(batch, context.token_index)
        else:
            assert self._received is not None
            hidden, deepstack = self._received[:, :1], self._received[:, 1:]
        hidden, deepstack = self.decoder(hidden, deepstack, context)
        return hidden, deepstack, context

    def _embed(self, batch: PackedBatch, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embedded tokens [T', 1, H] with images in their places, and DeepStack features [T', D, H] of the same tokens.

        An image that many sequences show was encoded once, and its gradient sums over them. Context-parallel ranks each
        encode all images of their batch.
        """
        tokens, visual_index = batch.tokens, batch.visual_index
        if index is not None:
            tokens, visual_index = tokens[index], visual_index[index]
        embedded = self.embedding(tokens[None], position_ids=None)  # [T', 1, H]
        features, levels = self.vision(batch.pixel_values, batch.grid_thw)
        visual, row = (visual_index >= 0)[:, None, None], visual_index.clamp(min=0)
        # F.embedding adds up the gradients of shared rows in a fixed order; indexing does not, not even on a CPU.
        embedded = torch.where(visual, F.embedding(row, features)[:, None], embedded)
        if batch.embedding_noise is not None:
            noise = batch.embedding_noise if index is None else batch.embedding_noise[index]
            embedded = embedded + noise[:, None].to(embedded.dtype)
        by_row = levels.transpose(0, 1)
        deepstack = F.embedding(row, by_row.flatten(1)).view(-1, *by_row.shape[1:]) * visual
        if self.config.sequence_parallel:
            embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded)
            deepstack = tensor_parallel.scatter_to_sequence_parallel_region(deepstack)
        return embedded, deepstack

    def _output_weight(self) -> Tensor:
        """This rank's rows of the output matrix. A tied one is a parameter of its own only without the embedding."""
        weight: Tensor | None = self.output_layer.weight
        return self.embedding.word_embeddings.weight if weight is None else weight

    def _whole_shard(self, hidden: Tensor) -> Tensor:
        """This context-parallel rank's tokens [T', H] on every tensor-parallel rank, their gradients summed back."""
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden)[:, 0]
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)[:, 0]

    def _spread(self, values: Tensor, place: Tensor, tokens: int) -> Tensor:
        """Values of some tokens of this rank as a vector over the whole batch, [tokens], summed over the context."""
        spread = values.new_zeros(tokens).index_put((place,), values)
        if self.config.context_parallel_size == 1:
            return spread
        return sum_over(spread, parallel_state.get_context_parallel_group())

    def _logits(self, hidden: Tensor, weight: Tensor, context: PackedContext) -> Tensor:
        logits = tensor_parallel.gather_from_tensor_model_parallel_region((hidden @ weight.T).float())
        logits = logits[:, : self.text_sizes.vocab_size]
        if context.token_order is None:
            return logits
        return gather_sequence(logits, parallel_state.get_context_parallel_group())[context.token_order]


def to_next_stage(hidden: Tensor, deepstack: Tensor) -> Tensor:
    """The one tensor that travels between stages, [T', 1 + D', H]."""
    if deepstack.shape[1]:
        hidden = torch.cat((hidden, deepstack), dim=1)
    return make_viewless_tensor(hidden, requires_grad=True, keep_graph=True)
