"""The mixture-of-experts discriminator: Qwen3-VL with every MLP upcycled to experts, and fp32 score heads (spec 3.1).

A batch holds whole sequences of two branches, perception (prompt and caption) and reasoning (prompt, think and answer).
With dedicated experts each branch owns half of the pool and one head; a shared pool has one head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from prism_megatron.model.layer_spec import PackedContext
from prism_megatron.model.qwen3_vl import Qwen3VL, TextSizes
from prism_megatron.model.vision import VisionSizes
from prism_megatron.types import PERCEPTION, REASONING, PackedBatch

BRANCHES = (PERCEPTION, REASONING)


class BranchRouter(TopKRouter):
    """Top-k router that lets a token choose only among its branch's experts.

    Probabilities are a softmax over the experts the token may use, the top k renormalised (spec 3.1). The
    load-balancing loss is the switch loss E * sum_e f_e * P_e over the tokens of each branch, averaged over layers and
    weighted by the micro-batch's share of tokens, attached to the forward pass so that recomputation keeps its gradient
    alive (spec 3.3, defect W1).
    """

    context: PackedContext | None = None
    groups: int = 1

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T', 1, E] -> probabilities [T', E] (zero where not routed) and routing map [T', E]."""
        assert self.context is not None
        assert self.context.token_branch is not None
        experts = self.config.num_moe_experts
        branch = _local_shard(self.context.token_branch, self.config.sequence_parallel)
        logits = logits.view(-1, experts).float()
        if self.groups > 1:
            owner = torch.arange(experts, device=logits.device) // (experts // self.groups)
            logits = logits.masked_fill(owner != branch.clamp(min=0)[:, None], float("-inf"))
        probs = logits.softmax(-1)
        chosen, index = probs.topk(self.topk, dim=-1)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        routed = torch.zeros_like(probs).scatter(1, index, chosen)
        routing_map = torch.zeros_like(probs, dtype=torch.bool).scatter(1, index, True)
        if self.training and torch.is_grad_enabled() and self.config.moe_aux_loss_coeff:
            loss = self._load_balance(probs, routing_map, branch)
            self.context.load_balance.append(loss.detach())
            routed = MoEAuxLossAutoScaler.apply(routed, loss * self.config.moe_aux_loss_coeff)
        return routed, routing_map

    def _load_balance(self, probs: Tensor, routing_map: Tensor, branch: Tensor) -> Tensor:
        assert self.context is not None
        experts_per_group = probs.shape[1] // self.groups
        losses = []
        for group in range(self.groups):
            mine = branch == group if self.groups > 1 else branch >= 0
            count = mine.sum().clamp(min=1)
            fraction = (routing_map & mine[:, None]).sum(0) / count
            mean_prob = (probs * mine[:, None]).sum(0) / count
            losses.append(experts_per_group * (fraction * mean_prob).sum() * mine.any())
        return torch.stack(losses).mean() * self.context.token_share / self.config.num_layers


class BranchLayer(TransformerLayer):
    """Megatron's layer, telling its router which branch each token belongs to."""

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.mlp.router.context = kwargs["packed_seq_params"]
        return super()._forward_mlp(hidden_states, *args, **kwargs)


class Discriminator(Qwen3VL):
    """Scores whole sequences: D_v for perception, D_r for reasoning (Eq. 1 and 2)."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        text_sizes: TextSizes,
        vision_sizes: VisionSizes,
        spec: TransformerBlockSubmodules,
        dedicated_experts: bool,
    ) -> None:
        super().__init__(config, vision_config, text_sizes, vision_sizes, spec, with_output_layer=False)
        groups = len(BRANCHES) if dedicated_experts else 1
        for layer in self.decoder.layers:
            layer.mlp.router.groups = groups
        self.score_heads = ScoreHeads(config, groups)

    def forward(self, batch: PackedBatch, token_share: float = 0.0) -> Tensor:
        """Score of every sequence, [N] float32, read at its last token."""
        self._token_share = token_share
        hidden = self.hidden_states(batch)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        assert batch.branch_ids is not None
        last = batch.cu_seqlens[1 : len(batch.branch_ids) + 1].long() - 1
        return self.score_heads(hidden[last, 0], batch.branch_ids)

    def _context(self, batch: PackedBatch) -> PackedContext:
        context = super()._context(batch)
        assert batch.branch_ids is not None
        padding = batch.branch_ids.new_full((1,), -1)
        context.token_branch = torch.cat((batch.branch_ids, padding))[batch.sequence_ids]
        context.token_share = self._token_share
        self._routing = context
        return context

    @property
    def load_balance_loss(self) -> Tensor:
        """Load-balancing loss of the last forward pass: mean over layers, times its share of tokens."""
        return torch.stack(self._routing.load_balance).sum()


class ScoreHeads(MegatronModule):
    """One linear read-out per branch (or one for both), float32 whatever the model's precision. [N, H] -> [N]."""

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        super().__init__(config=config)
        self.weight = nn.Parameter(torch.zeros(heads, config.hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor, branch_ids: Tensor) -> Tensor:
        scores = hidden.float() @ self.weight.T
        return scores.gather(1, (branch_ids % len(self.weight))[:, None])[:, 0]


def _local_shard(tokens: Tensor, sequence_parallel: bool) -> Tensor:
    """This rank's part of a [T] tensor, cut as Megatron cuts the sequence."""
    if not sequence_parallel:
        return tokens
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    return tokens.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
