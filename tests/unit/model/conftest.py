"""Megatron's groups for one process, which these tests build models in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prism_megatron.config import ParallelConfig
from prism_megatron.parallel import groups


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=1)
    yield
    groups.shutdown()
