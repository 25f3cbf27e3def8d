"""The mixture-of-experts discriminator: Qwen3-VL with every MLP upcycled to experts, and fp32 score heads (spec 3.1).

A batch holds whole sequences of two branches, perception (prompt and caption) and reasoning (prompt, think and answer).
With dedicated experts each branch owns half of the pool and one head; a shared pool has one head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from prism_megatron.model.packed import PackedContext
from prism_megatron.model.qwen3_vl import ChunkPlace, Qwen3VL, TextSizes, to_next_stage
from prism_megatron.model.vision import VisionSizes
from prism_megatron.parallel.context import sum_over
from prism_megatron.types import PERCEPTION, REASONING, PackedBatch

BRANCHES = (PERCEPTION, REASONING)


class Discriminator(Qwen3VL):
    """Scores whole sequences: D_v for perception, D_r for reasoning (Eq. 1 and 2)."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        text_sizes: TextSizes,
        vision_sizes: VisionSizes,
        place: ChunkPlace,
        dedicated_experts: bool,
    ) -> None:
        super().__init__(config, vision_config, text_sizes, vision_sizes, place, with_output_layer=False)
        groups = len(BRANCHES) if dedicated_experts else 1
        for layer in self.decoder.layers:
            layer.mlp.router.groups, layer.mlp.router.logged = groups, True
        # Whole sequences on this rank, nothing added behind the last layer, and no FP8 product that wants whole blocks.
        self.may_skip = not config.sequence_parallel and config.context_parallel_size == 1 and not config.fp8
        self.may_skip &= len(vision_sizes.deepstack_layers) < config.num_layers
        if place.is_last:
            self.decoder.layers[-1].last = True
            self.score_heads = ScoreHeads(config, groups)

    def forward(self, batch: PackedBatch, token_share: float = 0.0) -> Tensor:  # type: ignore[override]
        """Score of every sequence, [N] float32, read at its last token; before the last stage, what the next needs."""
        # Load balancing, which training adds, is over all tokens of the last layer, too.
        skip = self.may_skip and not torch.is_grad_enabled() and len(batch.last_tokens) > 0
        hidden, deepstack, context = self._decode(batch, token_share, batch.last_tokens if skip else None)
        if not self.post_process:
            return to_next_stage(hidden, deepstack)
        assert batch.branch_ids is not None
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        read = hidden[:, 0] if skip else _at(hidden[:, 0], batch.last_tokens, context)
        scores: Tensor = self.score_heads(read, batch.branch_ids)
        if context.token_index is None:
            return scores
        # Summed behind the heads, so that each context-parallel rank has its own part of their gradient.
        return sum_over(scores, parallel_state.get_context_parallel_group())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's language models end in an output layer and save it by name; this one is saved as it is."""
        state: dict[str, Any] = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return state


class ScoreHeads(MegatronModule):
    """One linear read-out per branch (or one for both), float32 whatever the model's precision. [N, H] -> [N]."""

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        super().__init__(config=config)
        self.weight = nn.Parameter(torch.zeros(heads, config.hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor, branch_ids: Tensor) -> Tensor:
        scores = hidden.float() @ self.weight.T
        return scores.gather(1, (branch_ids % len(self.weight))[:, None])[:, 0]


def _at(hidden: Tensor, tokens: Tensor, context: PackedContext) -> Tensor:
    """Hidden states [N, H] of some tokens of the whole batch, zero where another context-parallel rank has them."""
    if context.token_index is None:
        return hidden[tokens]
    here = context.token_index == tokens[:, None]  # [N, T']
    return hidden[here.int().argmax(1)] * here.any(1)[:, None]
