"""Dense Qwen3-VL weights -> mixture-of-experts discriminator weights (spec 3.2)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from prism_megatron.config import DiscriminatorConfig
from prism_megatron.convert.transfer import TensorSource
from prism_megatron.model.build import HFSizes

_ROUTER_STD = 0.02  # spec 3.2
_HEAD_STD = 0.02  # spec 3.1


class UpcycledWeights:
    """The discriminator's tensors (spec 8.2 names), made one at a time from a dense checkpoint.

    Every expert is the dense MLP plus noise of ``upcycle_noise`` times each weight's own standard deviation; absolute
    noise, as in the paper's code, is a very different perturbation from one width to another. Every tensor has its own
    generator, so the result depends on nothing but the seed.
    """

    def __init__(self, dense: TensorSource, sizes: HFSizes, config: DiscriminatorConfig, seed: int) -> None:
        self._dense, self._config, self._seed = dense, config, seed
        self._hidden = sizes.text["hidden_size"]
        self._heads = 2 if config.experts == "dedicated" else 1
        self._made = {"v_head.1.weight"}
        for layer in range(sizes.text["num_hidden_layers"]):
            mlp = f"model.language_model.layers.{layer}.mlp"
            self._made |= {f"{mlp}.gate.weight", f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj"}

    @property
    def names(self) -> set[str]:
        dense = {n for n in self._dense.names if ".mlp." not in n or n.startswith("model.visual")}
        return dense | self._made

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            return self._dense[name]
        generator = torch.Generator().manual_seed(_stable_seed(f"{self._seed}/{name}"))
        if name == "v_head.1.weight":
            return torch.randn(self._heads, self._hidden, generator=generator) * _HEAD_STD
        mlp, _, part = name.partition(".mlp.")
        if part == "gate.weight":
            return torch.randn(self._config.num_experts, self._hidden, generator=generator) * _ROUTER_STD
        if part == "experts.down_proj":
            dense = self._dense[f"{mlp}.mlp.down_proj.weight"].T
        else:
            gate, up = (self._dense[f"{mlp}.mlp.{which}_proj.weight"] for which in ("gate", "up"))
            dense = torch.cat((gate, up)).T
        noise = torch.randn(self._config.num_experts, *dense.shape, generator=generator)
        return dense + noise * (self._config.upcycle_noise * dense.float().std())


def _stable_seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
