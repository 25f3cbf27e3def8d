"""The mixture-of-experts discriminator: Qwen3-VL with every MLP upcycled to experts, and fp32 score heads (spec 3.1).

A batch has sequences of two branches, perception (prompt and caption) and reasoning (prompt, think and answer). With
dedicated experts each branch has half of the experts and a score head; with shared experts both have all and one head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from prism_megatron.model.packed import PackedContext, packed_context
from prism_megatron.model.qwen3_vl import PipelinePosition, Qwen3VL, TextSizes, to_next_stage
from prism_megatron.model.router_stats import RouterStats
from prism_megatron.model.vision import VisionSizes
from prism_megatron.parallel.context import sum_over
from prism_megatron.types import PERCEPTION, REASONING, PackedBatch

BRANCHES = (PERCEPTION, REASONING)


class Discriminator(Qwen3VL):
    """Scores sequences: D_v for perception, D_r for reasoning (Eq. 1 and 2)."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        text_sizes: TextSizes,
        vision_sizes: VisionSizes,
        position: PipelinePosition,
        dedicated_experts: bool,
    ) -> None:
        """Build this rank's chunk with undefined weights.

        Args:
            config: Megatron's configuration of the language model, with experts.
            vision_config: Megatron's configuration of the vision tower.
            text_sizes: Sizes of the language model that ``config`` does not have.
            vision_sizes: Sizes of the vision tower that ``vision_config`` does not have.
            position: The chunk's position in the pipeline.
            dedicated_experts: Split the experts into a group per branch, each with a score head.
        """
        groups = len(BRANCHES) if dedicated_experts else 1
        super().__init__(
            config, vision_config, text_sizes, vision_sizes, position, with_output_layer=False, branch_groups=groups
        )
        # The last layer may compute fewer tokens if this rank has whole sequences, no DeepStack level is added after
        # that layer, and no FP8 product needs whole blocks of tokens.
        self.may_skip = not config.sequence_parallel and config.context_parallel_size == 1 and not config.fp8
        self.may_skip &= len(vision_sizes.deepstack_layers) < config.num_layers
        if position.is_last:
            self.score_heads = ScoreHeads(config, groups)

    def forward(  # type: ignore[override]
        self, batch: PackedBatch, token_share: float = 0.0, router_stats: RouterStats | None = None
    ) -> Tensor:
        """Score every sequence at its last token, [N] float32; before the last stage, return the next stage's input.

        ``token_share`` is the micro-batch's fraction of the global batch's tokens. In training every router records
        into ``router_stats``.
        """
        # In training the load-balancing loss is over all tokens of the last layer, too.
        skip = self.may_skip and not torch.is_grad_enabled() and len(batch.last_tokens) > 0
        output_tokens = batch.last_tokens if skip else None
        context = packed_context(batch, self.config, self.text_sizes.rotary, token_share, output_tokens, router_stats)
        hidden, deepstack = self._decode(batch, context)
        if not self.post_process:
            return to_next_stage(hidden, deepstack)
        assert batch.branch_ids is not None
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        last = hidden[:, 0] if skip else _hidden_at(hidden[:, 0], batch.last_tokens, context)
        scores: Tensor = self.score_heads(last, batch.branch_ids)
        if context.token_index is None:
            return scores
        # Summed after the heads, so that each context-parallel rank has its own part of their gradient.
        return sum_over(scores, parallel_state.get_context_parallel_group())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Skip Megatron's rule for language models, which saves an output layer by name: there is none."""
        state: dict[str, Any] = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return state


class ScoreHeads(MegatronModule):
    """Linear score heads, one per branch or one for both, in float32 at any model precision: [N, H] -> [N]."""

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        super().__init__(config=config)
        self.weight = nn.Parameter(torch.zeros(heads, config.hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor, branch_ids: Tensor) -> Tensor:
        scores = hidden.float() @ self.weight.T
        return scores.gather(1, (branch_ids % len(self.weight))[:, None])[:, 0]


def _hidden_at(hidden: Tensor, tokens: Tensor, context: PackedContext) -> Tensor:
    """Return hidden states [N, H] of ``tokens`` of the whole batch, zero for those on other context-parallel ranks."""
    if context.token_index is None:
        return hidden[tokens]
    here = context.token_index == tokens[:, None]  # [N, T']
    return hidden[here.int().argmax(1)] * here.any(1)[:, None]
