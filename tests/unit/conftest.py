"""Fixtures of unit tests in several folders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prism_megatron.convert.rules import REPLICATED, Rule


@pytest.fixture(scope="session")
def one_parameter() -> tuple[nn.Module, list[Rule]]:
    """The smallest model that can be exported, ones in one parameter and no layers, and its conversion table."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, 2))
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList()
    return model, [Rule("weight", ("a.weight",), ((2, 2),), REPLICATED)]
