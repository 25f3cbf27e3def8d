"""What every test may use: the tiny checkpoint and its data, made once per session, and a launcher of real ranks."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
_CORES = os.cpu_count() or 1
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # tests beside each other share the cores: threads that wait for one spin
    _CORES = max(_CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1)
    os.environ["OMP_NUM_THREADS"] = str(_CORES)
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole suite is to end within an hour on two cores."""
    if "PRISM_SLOW_TESTS" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; set PRISM_SLOW_TESTS=1"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly initialised tiny Qwen3-VL in HF format."""
    from tests.models import make_variant

    return make_variant("tied", tmp_path_factory.mktemp("tiny") / "base", seed=1)


@pytest.fixture(scope="session")
def other_tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    from tools.make_tiny_model import make_tiny_model

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
    """A tiny policy that already answers in the grammar."""
    root = tmp_path_factory.mktemp("speaks")
    sft = [f"model.hf_checkpoint={tiny_checkpoint}", f"data={tiny_data}/sft.jsonl", "global_batch_size=16"]
    run = ["run.name=sft", f"run.dir={root}", "run.train_iters=150", "eval.num_questions=0"]
    launch(1, ["-m", "prism_megatron.train", "tiny_sft", *sft, *run])
    return root / "sft" / "hf"


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Start real ranks: ``launch(ranks, ["-m", "module", ...])`` returns their output, or fails with it."""
    return _launch


def _launch(
    ranks: int, arguments: Sequence[str], cwd: Path = ROOT, timeout: float = 420, expect: int | None = 0
) -> str:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(max(_CORES // ranks, 1)),
        # A rank that hangs prints its stack before the launcher is killed.
        "PYTHONFAULTHANDLER": "1",
        "PRISM_HANG_SECONDS": str(timeout - 15),
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(port),
    ]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # ranks have sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(arguments)}: no end after {timeout} s\n{output[-8000:]}")
    if expect is not None and process.returncode != expect:
        pytest.fail(f"{' '.join(arguments)}: exit status {process.returncode}, not {expect}\n{output[-8000:]}")
    return output
