"""Calls to vLLM that put the engine to sleep and wake it, which it does on a GPU only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prism_megatron.config import OptimizerConfig, ParallelConfig, RolloutConfig
from prism_megatron.convert.rules import Rule
from prism_megatron.model.sizes import read_sizes
from prism_megatron.parallel import groups
from prism_megatron.rollout import engine as engine_module
from prism_megatron.rollout.engine import RolloutEngine
from prism_megatron.rollout.interface import EngineConfig
from prism_megatron.stages.rollouts import push_weights
from prism_megatron.stages.setup import TrainableModel

PUSH = ["start", "a.weight", "finish"]


class RecordedLLM:
    """A replacement for vLLM's LLM and its engine: records calls, and sleeps until both parts are woken."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asleep: set[str] = set()
        self.llm_engine = self

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(vocab={})

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        self.calls += [name for name, _ in request["update_info"]["named"]]

    def finish_weight_update(self, version: str) -> None:
        self.calls.append("finish")

    def reset_prefix_cache(self) -> None: ...

    def reset_encoder_cache(self) -> None: ...

    def reset_mm_cache(self) -> None: ...

    def is_sleeping(self) -> bool:
        return bool(self.asleep)

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        self.calls += [f"wake {tag}" for tag in tags]
        self.asleep -= set(tags)


@pytest.fixture(scope="module")
def policy(tiny_checkpoint: Path, one_parameter: tuple[nn.Module, list[Rule]]) -> Iterator[TrainableModel]:
    groups.initialize(ParallelConfig(), seed=1)
    model, table = one_parameter
    sizes = read_sizes(tiny_checkpoint)
    yield TrainableModel("policy", [model], None, OptimizerConfig(), table, sizes, tiny_checkpoint, {})
    groups.shutdown()


def recorded_calls(policy: TrainableModel, level: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Push and sleep in two iterations; a second call of sleep does nothing."""
    llm = RecordedLLM()
    monkeypatch.setattr(engine_module, "_start", lambda *_: llm)
    sizes = EngineConfig(1, "float32", 512, 16, 1.0, 0.5, enforce_eager=True, seed=1, sleep_level=level)
    engine = RolloutEngine(policy.source, sizes)
    for iteration in range(2):
        push_weights(engine, policy, iteration, RolloutConfig())
        engine.sleep()
        engine.sleep()
    return llm.calls


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("level", [1, 2])
def test_weights_are_woken_before_an_update_and_the_cache_after_it(
    level: int, policy: TrainableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = f"sleep {level}"
    assert recorded_calls(policy, level, monkeypatch) == [*PUSH, asleep, "wake weights", *PUSH, "wake kv_cache", asleep]


@pytest.mark.usefixtures("gpu")
def test_level_0_never_sleeps(policy: TrainableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded_calls(policy, 0, monkeypatch) == [*PUSH, *PUSH]


def test_on_a_cpu_nothing_sleeps(policy: TrainableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert recorded_calls(policy, 1, monkeypatch) == [*PUSH, *PUSH]
