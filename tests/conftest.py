"""Fixtures for all tests: the tiny checkpoint and its data, made once per session, and a launcher of real ranks."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks, usable_cores

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(usable_cores())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is slow: set-up, quickstart and tests together are to take 40 minutes on two cores."""
    if "PRISM_SLOW_TESTS" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; set PRISM_SLOW_TESTS=1"))


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """Take back the handlers that a command called in this process installs: they end it, in a later test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly initialised tiny Qwen3-VL in HF format."""
    from tests.models import make_variant

    return make_variant("tied", tmp_path_factory.mktemp("tiny") / "base", seed=1)


@pytest.fixture(scope="session")
def other_tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    from recipes.tiny_model import make_tiny_model

    directory = tmp_path_factory.mktemp("tiny") / "other"
    make_tiny_model(directory, seed=2)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of the built-in visual task."""
    from prism_megatron.data.shapes import ShapesConfig, write_shapes_data

    directory = tmp_path_factory.mktemp("data")
    write_shapes_data(directory, ShapesConfig(sft_rows=64, alignment_rows=16, rlvr_rows=16, heldout_rows=40))
    return directory


@pytest.fixture(scope="session")
def speaking_checkpoint(
    tiny_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny policy that already answers in the grammar, trained once for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "speaks"
    root.mkdir(exist_ok=True)
    sft = [f"model.hf_checkpoint={tiny_checkpoint}", f"data={tiny_data}/sft.jsonl", "global_batch_size=16"]
    run = ["run.name=sft", f"run.dir={root}", "run.train_iters=150", "eval.num_questions=0"]
    with (root / "one worker trains").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "sft" / "finished.json").exists():
            launch(1, ["-m", "recipes.train", "tiny_sft", *sft, *run])
    return root / "sft" / "hf"


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run real ranks: ``launch(ranks, ["-m", "module", ...])`` returns their output, or fails with it."""
    root = tmp_path_factory.mktemp("ranks")

    number = itertools.count()

    def run(ranks: int, arguments: Sequence[str], expect: int = 0, **options: Any) -> str:
        output = root / f"{next(number)}.txt"
        status = run_ranks(ranks, arguments, output, **options)
        text = output.read_text(errors="replace")
        if status != expect:
            pytest.fail(f"{' '.join(arguments)}: exit status {status}, not {expect}\n{text[-8000:]}")
        return text

    return run
