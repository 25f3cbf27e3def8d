"""Top-k routing restricted to a branch's experts, with a load-balancing loss that does not depend on the layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from prism_megatron.model.packed import PackedContext
from prism_megatron.parallel.context import sum_over
from prism_megatron.types import PERCEPTION, REASONING
from prism_megatron.upstream.megatron import MoEAuxLossAutoScaler


class BranchRouter(TopKRouter):
    """Top-k router that lets a token choose only among the experts of its branch.

    The experts are split evenly into ``branch_groups``; with one group every token may use all of them. Probabilities
    are a softmax over the experts the token may use, and the top k are renormalised (spec 3.1). The load-balancing loss
    is the switch loss E * sum_e f_e * P_e over each branch's tokens in the micro-batch, on whichever tensor- and
    context-parallel ranks they are, averaged over layers and weighted by the micro-batch's share of tokens. It is
    attached to the routing probabilities, so that its gradient survives recomputation (spec 3.3, defect W1).
    """

    def __init__(self, *args: Any, branch_groups: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.branch_groups = branch_groups

    def forward(self, hidden: Tensor, context: PackedContext) -> tuple[Tensor, Tensor]:
        """Route tokens ``hidden`` [T', 1, H]; record into ``context.router_stats`` in training.

        Returns:
            Probabilities [T', E], zero for experts that were not chosen, and the routing map [T', E].
        """
        assert context.token_branch is not None
        experts = self.config.num_moe_experts
        branch = _sequence_shard(context.token_branch, self.config.sequence_parallel)
        logits = self.gating(hidden).view(-1, experts).float()
        if self.branch_groups > 1:
            group_of_expert = torch.arange(experts, device=logits.device) // (experts // self.branch_groups)
            logits = logits.masked_fill(group_of_expert != branch.clamp(min=0)[:, None], float("-inf"))
        probs = logits.softmax(-1)
        chosen, index = probs.topk(self.topk, dim=-1)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        routed = torch.zeros_like(probs).scatter(1, index, chosen)
        routing_map = torch.zeros_like(probs, dtype=torch.bool).scatter(1, index, True)
        coefficient, stats = self.config.moe_aux_loss_coeff, context.router_stats
        if self.training and torch.is_grad_enabled() and (stats is not None or coefficient):
            loss = self._load_balance(probs, routing_map, branch) * context.token_share / self.config.num_layers
            if stats is not None:
                stats.record(loss.detach(), self._routing_counts(probs.detach(), routing_map, branch))
            if coefficient:
                routed = MoEAuxLossAutoScaler.apply(routed, loss * coefficient)
        return routed, routing_map

    def _load_balance(self, probs: Tensor, routing_map: Tensor, branch: Tensor) -> Tensor:
        experts = probs.shape[1]
        # Rows: tokens routed to each expert, probability of each expert, tokens; columns: experts. One per group.
        sums = []
        for group in range(self.branch_groups):
            mask = (branch == group if self.branch_groups > 1 else branch >= 0)[:, None]
            sums.append(torch.stack(((routing_map & mask).sum(0), (probs * mask).sum(0), mask.sum().expand(experts))))
        stacked = self._over_all_tokens(torch.stack(sums))
        routed, prob, count = stacked.unbind(1)
        balance = experts // self.branch_groups * (routed * prob / count.clamp(min=1).square()).sum(1)
        return balance.mean()

    def _routing_counts(self, probs: Tensor, routing_map: Tensor, branch: Tensor) -> Tensor:
        """Tokens sent to each expert, summed routing entropy (nats) and number of tokens, per branch: [2, E + 2]."""
        entropy = torch.special.entr(probs).sum(-1, keepdim=True)
        per_token = torch.cat((routing_map.float(), entropy, torch.ones_like(entropy)), -1)
        return self._over_all_tokens(torch.stack([per_token[branch == b].sum(0) for b in (PERCEPTION, REASONING)]))

    def _over_all_tokens(self, sums: Tensor) -> Tensor:
        """Add up sums over this rank's tokens where the micro-batch's tokens are split over ranks."""
        if self.config.sequence_parallel or self.config.context_parallel_size > 1:
            return sum_over(sums, parallel_state.get_tensor_and_context_parallel_group())
        return sums


class BranchMoELayer(MoELayer):
    """Megatron's mixture of experts with the packed batch's context as an argument, for its :class:`BranchRouter`."""

    def forward(self, hidden_states: Tensor, context: PackedContext) -> tuple[Tensor, None]:  # type: ignore[override]
        """Map [T', 1, H] to [T', 1, H]; the second result is Megatron's bias, which there is none of."""
        probs, routing_map = self.router(hidden_states, context)
        tokens, probs = self.preprocess(hidden_states, probs, routing_map)
        tokens, probs = self.dispatch(tokens, probs)
        output, _ = self.routed_experts_compute(tokens, probs)
        return self.postprocess(self.combine(output), None), None


class RoutedLayer(TransformerLayer):
    """Megatron's layer with a :class:`BranchMoELayer`.

    The model's last layer, ``is_last``, computes experts only for the tokens in ``context.output_tokens``, if there are
    any, and outputs only these.
    """

    def __init__(self, *args: Any, is_last: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_last = is_last

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context: PackedContext = kwargs["packed_seq_params"]
        if self.is_last and (tokens := context.output_tokens) is not None:
            assert context.token_branch is not None
            hidden_states = hidden_states[tokens]
            context = replace(context, token_branch=context.token_branch[tokens])
        output = self.mlp(self._forward_pre_mlp_layernorm(hidden_states), context)
        return self._forward_post_mlp(output, hidden_states)


def _sequence_shard(tokens: Tensor, sequence_parallel: bool) -> Tensor:
    """Return this rank's part of a [T'] tensor under sequence parallelism."""
    if not sequence_parallel:
        return tokens
    size = parallel_state.get_tensor_model_parallel_world_size()
    return tokens.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
