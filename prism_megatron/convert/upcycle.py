"""Dense Qwen3-VL weights -> mixture-of-experts discriminator weights (spec 3.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import DiscriminatorConfig
from prism_megatron.convert.rules import SCORE_HEAD, Sliceable
from prism_megatron.convert.transfer import TensorSource
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes

_ROUTER_STD = 0.02  # spec 3.2
_HEAD_STD = 0.02  # spec 3.1
NOISES = ("relative", "absolute")


class WithScoreHead:
    """A checkpoint and a new score head, [heads, H] (spec 3.1)."""

    def __init__(self, source: TensorSource, heads: int, hidden_size: int, seed: int) -> None:
        if SCORE_HEAD in source.names:
            raise UserError("the checkpoint already has a score head; initialise none")
        self._source = source
        self._head = initial_head(heads, hidden_size, seed)

    @property
    def names(self) -> set[str]:
        return self._source.names | {SCORE_HEAD}

    def lazy(self, name: str) -> Sliceable:
        return self._head if name == SCORE_HEAD else self._source.lazy(name)

    def __getitem__(self, name: str) -> Tensor:
        return self.lazy(name)[:]


class UpcycledWeights:
    """The discriminator's tensors (names of spec 8.2), computed one at a time from a dense checkpoint.

    Every expert is the dense MLP plus Gaussian noise. Its standard deviation is ``upcycle_noise`` times that of each
    weight (``noise`` relative) or ``upcycle_noise`` itself (absolute, as in the paper's code), which is a different
    perturbation for each width. Every tensor has its own generator, so the result depends on the seed only.
    """

    def __init__(
        self, dense: TensorSource, sizes: HFSizes, config: DiscriminatorConfig, seed: int, noise: str = "relative"
    ) -> None:
        assert noise in NOISES, noise
        self._dense, self._config, self._seed, self._noise = dense, config, seed, noise
        hidden, width, experts = sizes.text["hidden_size"], sizes.text["intermediate_size"], config.num_experts
        self._made: dict[str, tuple[int, ...]] = {SCORE_HEAD: (2 if config.experts == "dedicated" else 1, hidden)}
        for layer in range(sizes.text["num_hidden_layers"]):
            mlp = f"model.language_model.layers.{layer}.mlp"
            self._made[f"{mlp}.gate.weight"] = (experts, hidden)
            self._made[f"{mlp}.experts.gate_up_proj"] = (experts, hidden, 2 * width)
            self._made[f"{mlp}.experts.down_proj"] = (experts, width, hidden)
        self._last: tuple[str, Tensor] | None = None

    @property
    def names(self) -> set[str]:
        dense = {n for n in self._dense.names if ".mlp." not in n or n.startswith("model.visual")}
        return dense | self._made.keys()

    def lazy(self, name: str) -> Sliceable:
        return _Made(self._made[name], lambda: self[name]) if name in self._made else self._dense.lazy(name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            return self._dense[name]
        if self._last is None or self._last[0] != name:  # the experts of a stack are requested one after another
            self._last = (name, self._make(name))
        return self._last[1]

    def _make(self, name: str) -> Tensor:
        if name == SCORE_HEAD:
            heads, hidden = self._made[name]
            return initial_head(heads, hidden, self._seed)
        generator = torch.Generator().manual_seed(_stable_seed(f"{self._seed}/{name}"))
        mlp, _, part = name.partition(".mlp.")
        if part == "gate.weight":
            return torch.randn(self._made[name], generator=generator) * _ROUTER_STD
        if part == "experts.down_proj":
            dense = self._dense[f"{mlp}.mlp.down_proj.weight"].T
        else:
            gate, up = (self._dense[f"{mlp}.mlp.{which}_proj.weight"] for which in ("gate", "up"))
            dense = torch.cat((gate, up)).T
        noise = torch.randn(self._made[name], generator=generator)
        scale = dense.float().std() if self._noise == "relative" else 1.0
        return dense + noise * (self._config.upcycle_noise * scale)


@dataclass(frozen=True)
class _Made:
    """A tensor that is computed when it is indexed."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        return self.make()[index]


def initial_head(heads: int, hidden_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(_stable_seed(f"{seed}/{SCORE_HEAD}"))
    return torch.randn(heads, hidden_size, generator=generator) * _HEAD_STD


def upcycled_config(sizes: HFSizes, num_experts: int, topk: int, load_balance_coeff: float) -> Mapping[str, Any]:
    """Return the changes to ``config.json`` of a dense model whose MLPs become experts."""
    return {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "num_experts": num_experts,
            "num_experts_per_tok": topk,
            "moe_intermediate_size": sizes.text["intermediate_size"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "router_aux_loss_coef": load_balance_coeff,
        },
    }


def _stable_seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
