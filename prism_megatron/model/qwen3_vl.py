"""Qwen3-VL on Megatron-core: vision tower, interleaved M-RoPE, DeepStack, packed sequences, any parallel layout.

A model is a list of chunks, one per virtual pipeline stage of this rank. The first chunk of the first stage has the
vision tower and the embedding, the last chunk of the last stage the output layer. Chunks pass one tensor on,
[T', 1 + D', H]: the hidden states and the DeepStack features of the D' levels that later layers add.
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
    """Sizes of the language model that are not in Megatron's TransformerConfig."""

    vocab_size: int
    rotary: Rotary
    tie_embeddings: bool


@dataclass(frozen=True)
class PipelinePosition:
    """Position of a model chunk in the pipeline. ``vp_stage`` is None without virtual pipeline stages."""

    is_first: bool
    is_last: bool
    vp_stage: int | None


class DeepStackBlock(TransformerBlock):
    """Megatron's decoder with DeepStack: level ``i`` is added to the visual tokens after layer ``i`` of the model."""

    def forward(self, hidden_states: Tensor, deepstack: Tensor, context: PackedContext) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Run this chunk's layers.

        Args:
            hidden_states: [T', 1, H], the tokens of this rank's context- and sequence-parallel shard.
            deepstack: [T', D', H], the levels that are not added yet.
            context: The packed batch's context.

        Returns:
            The hidden states and the levels that are not added yet.
        """
        recompute = self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled()
        # Delayed scaling has one history for all layers, the other recipes one scale per tensor or block.
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
        """Run a layer again in the backward pass. Only Transformer Engine's checkpoint restores the FP8 scales."""
        if self.config.fp8:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            return te_checkpoint(run, False, tensor_parallel.get_cuda_rng_tracker, self.pg_collection.tp, hidden)
        return tensor_parallel.checkpoint(run, False, hidden)


class Qwen3VL(LanguageModule):
    """A chunk of the policy: the layers of one (virtual) pipeline stage."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        text_sizes: TextSizes,
        vision_sizes: VisionSizes,
        position: PipelinePosition,
        with_output_layer: bool = True,
        branch_groups: int = 1,
    ) -> None:
        """Build this rank's chunk with undefined weights.

        Args:
            config: Megatron's configuration of the language model.
            vision_config: Megatron's configuration of the vision tower.
            text_sizes: Sizes of the language model that ``config`` does not have.
            vision_sizes: Sizes of the vision tower that ``vision_config`` does not have.
            position: The chunk's position in the pipeline.
            with_output_layer: False for a model that outputs hidden states.
            branch_groups: Into how many groups the experts are split, each for tokens of one branch.
        """
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = position.is_first, position.is_last, position.vp_stage
        self.share_embeddings_and_output_weights = text_sizes.tie_embeddings and with_output_layer
        self.text_sizes = text_sizes
        self._received: Tensor | None = None
        # If the ranks do not divide the vocabulary, the last rank has rows of padding, which no sum includes.
        rows = -(-text_sizes.vocab_size // config.tensor_model_parallel_size)
        self.padding = max((parallel_state.get_tensor_model_parallel_rank() + 1) * rows - text_sizes.vocab_size, 0)
        assert self.padding < rows, "a tensor-parallel rank has no token of the vocabulary"
        if position.is_first:
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
            spec=decoder_block_spec(
                config, get_num_layers_to_build(config, position.vp_stage), branch_groups, ends_model=position.is_last
            ),
            pre_process=position.is_first,
            post_process=position.is_last,
            vp_stage=position.vp_stage,
        )
        if with_output_layer and position.is_last:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                rows * config.tensor_model_parallel_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=text_sizes.tie_embeddings and position.is_first,
            )
        if with_output_layer:
            self.setup_embeddings_and_output_layer()

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero the padding rows of the embedding and of the output layer."""
        for name, parameter in self.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter[len(parameter) - self.padding :] = 0

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the previous stage's output from Megatron's pipeline schedule."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self, batch: PackedBatch, token_share: float = 0.0, return_logits: bool = False, temperature: float = 1.0
    ) -> Tensor | TokenScores:
        """Run this chunk on a micro-batch.

        Args:
            batch: The whole packed batch.
            token_share: The micro-batch's fraction of the global batch's tokens, weight of its load-balancing loss.
            return_logits: Return logits instead of scores.
            temperature: Divides the logits before the softmax.

        Returns:
            On the last chunk the scores of the trained tokens, zero for other tokens ([T] on every context-parallel
            rank), or logits [T, V] in float32; on other chunks the next one's input, [T', 1 + D', H].
        """
        context = packed_context(batch, self.config, self.text_sizes.rotary, token_share)
        hidden, deepstack = self._decode(batch, context)
        if not self.post_process:
            return to_next_stage(hidden, deepstack)
        hidden = self._gather_hidden(hidden)
        weight = self._output_weight()
        if return_logits:
            return self._logits(hidden, weight, context)
        index = context.token_index
        mask, targets = (x if index is None else x[index] for x in (batch.loss_mask, batch.targets))
        (trained,) = mask.nonzero(as_tuple=True)
        scores = token_scores(hidden[trained] / temperature, weight, targets[trained], self.padding)
        indices = trained if index is None else index[trained]
        return TokenScores(*(self._scatter_to_batch(values, indices, len(batch.tokens)) for values in scores))

    def _decode(self, batch: PackedBatch, context: PackedContext) -> tuple[Tensor, Tensor]:
        """Return the hidden states after this chunk's layers and the DeepStack levels that are not added yet.

        Hidden states are [T', 1, H], or [N, 1, H] for N ``context.output_tokens``; levels are [T', D', H].
        """
        if self.pre_process:
            hidden, deepstack = self._embed(batch, context.token_index)
        else:
            assert self._received is not None
            hidden, deepstack = self._received[:, :1], self._received[:, 1:]
        hidden, deepstack = self.decoder(hidden, deepstack, context)
        return hidden, deepstack

    def _embed(self, batch: PackedBatch, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed tokens [T', 1, H], visual features replacing visual tokens; return them and their DeepStack levels.

        ``index`` [T'] are this rank's tokens under context parallelism. Levels are [T', D, H], zero for text. An image
        in several sequences is encoded once, and its gradient is summed over them. Every context-parallel rank encodes
        all images of the batch.
        """
        tokens, visual_index = batch.tokens, batch.visual_index
        if index is not None:
            tokens, visual_index = tokens[index], visual_index[index]
        embedded = self.embedding(tokens[None], position_ids=None)  # [T', 1, H]
        features, levels = self.vision(batch.pixel_values, batch.grid_thw)
        visual, row = (visual_index >= 0)[:, None, None], visual_index.clamp(min=0)
        # F.embedding sums the gradients of shared rows in a fixed order; indexing does not, even on a CPU.
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
        """Return this rank's rows of the output layer, the embedding's if they are tied and on this chunk."""
        weight: Tensor | None = self.output_layer.weight
        return self.embedding.word_embeddings.weight if weight is None else weight

    def _gather_hidden(self, hidden: Tensor) -> Tensor:
        """Gather [T', H] over the sequence-parallel ranks; the gradient is summed over the tensor-parallel ranks."""
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden)[:, 0]
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)[:, 0]

    def _scatter_to_batch(self, values: Tensor, indices: Tensor, tokens: int) -> Tensor:
        """Write values of this rank's tokens at ``indices`` of the whole batch, [tokens]; zero for other tokens."""
        scattered = values.new_zeros(tokens).index_put((indices,), values)
        if self.config.context_parallel_size == 1:
            return scattered
        return sum_over(scattered, parallel_state.get_context_parallel_group())

    def _logits(self, hidden: Tensor, weight: Tensor, context: PackedContext) -> Tensor:
        """Return logits [T, V] of the whole batch from hidden states [T', H] and this rank's output ``weight``."""
        logits = tensor_parallel.gather_from_tensor_model_parallel_region((hidden @ weight.T).float())
        logits = logits[:, : self.text_sizes.vocab_size]
        if context.token_order is None:
            return logits
        return gather_sequence(logits, parallel_state.get_context_parallel_group())[context.token_order]


def to_next_stage(hidden: Tensor, deepstack: Tensor) -> Tensor:
    """Join hidden states and DeepStack levels to the tensor that stages pass on, [T', 1 + D', H]."""
    if deepstack.shape[1]:
        hidden = torch.cat((hidden, deepstack), dim=1)
    return make_viewless_tensor(hidden, requires_grad=True, keep_graph=True)
