"""Top-k routing that knows about branches, and whose load-balancing loss does not depend on the layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from prism_megatron.model.packed import PackedContext
from prism_megatron.parallel.context import sum_over
from prism_megatron.types import PERCEPTION, REASONING


class BranchRouter(TopKRouter):
    """Top-k router that lets a token choose only among its branch's experts; a policy has one branch and one pool.

    Probabilities are a softmax over the experts the token may use, the top k renormalised (spec 3.1). The
    load-balancing loss is the switch loss E * sum_e f_e * P_e over a micro-batch's tokens of each branch, however they
    lie over tensor- and context-parallel ranks, averaged over layers and weighted by the micro-batch's share of tokens.
    It is attached to the forward pass, so that recomputation keeps its gradient alive (spec 3.3, defect W1). A
    discriminator's router is ``logged``: in training it tells that loss and where tokens go, whatever the coefficient.
    """

    context: PackedContext | None = None
    groups: int = 1
    logged: bool = False

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
        coefficient = self.config.moe_aux_loss_coeff
        if self.training and torch.is_grad_enabled() and (self.logged or coefficient):
            loss = self._load_balance(probs, routing_map, branch)
            if self.logged:
                self.context.load_balance.append(loss.detach())
                self.context.routing.append(self._routing_stats(probs.detach(), routing_map, branch))
            if coefficient:
                routed = MoEAuxLossAutoScaler.apply(routed, loss * coefficient)
        return routed, routing_map

    def _load_balance(self, probs: Tensor, routing_map: Tensor, branch: Tensor) -> Tensor:
        assert self.context is not None
        experts = probs.shape[1]
        # Rows: tokens routed to each expert, probability of each expert, tokens; columns: experts. One per group.
        sums = []
        for group in range(self.groups):
            mine = (branch == group if self.groups > 1 else branch >= 0)[:, None]
            sums.append(torch.stack(((routing_map & mine).sum(0), (probs * mine).sum(0), mine.sum().expand(experts))))
        stacked = self._over_all_tokens(torch.stack(sums))
        routed, prob, count = stacked.unbind(1)
        balance = experts // self.groups * (routed * prob / count.clamp(min=1).square()).sum(1)
        return balance.mean() * self.context.token_share / self.config.num_layers

    def _routing_stats(self, probs: Tensor, routing_map: Tensor, branch: Tensor) -> Tensor:
        """Of each branch: tokens sent to each expert, summed entropy (nats) of the choice, tokens. [2, E + 2]."""
        entropy = torch.special.entr(probs).sum(-1, keepdim=True)
        per_token = torch.cat((routing_map.float(), entropy, torch.ones_like(entropy)), -1)
        return self._over_all_tokens(torch.stack([per_token[branch == b].sum(0) for b in (PERCEPTION, REASONING)]))

    def _over_all_tokens(self, sums: Tensor) -> Tensor:
        """Sums over this rank's tokens, added up where the micro-batch's tokens lie on several ranks."""
        if self.config.sequence_parallel or self.config.context_parallel_size > 1:
            return sum_over(sums, parallel_state.get_tensor_and_context_parallel_group())
        return sums


class RoutedLayer(TransformerLayer):
    """Megatron's layer, telling its router which branch each token belongs to.

    Where it is ``last``, only the tokens that are read from go through its experts and leave it.
    """

    last = False

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        context = kwargs["packed_seq_params"]
        if self.last and context.read is not None:
            hidden_states = hidden_states[context.read]
            context = replace(context, token_branch=context.token_branch[context.read])
        self.mlp.router.context = context
        return super()._forward_mlp(hidden_states, *args, **kwargs)


def _local_shard(tokens: Tensor, sequence_parallel: bool) -> Tensor:
    """This rank's part of a [T'] tensor, cut as Megatron cuts the sequence."""
    if not sequence_parallel:
        return tokens
    size = parallel_state.get_tensor_model_parallel_world_size()
    return tokens.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
