"""Signals: the death of torchrun's agent, and INT before a stage handles it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron import train
from prism_megatron.config import StageConfig

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import time
from prism_megatron.stages import preemption
preemption.follow_torchrun()
signals = preemption.StopSignals()
signals.listen()
print("listens", flush=True)
while not signals.requested:
    time.sleep(0.01)
"""
AGENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"


def test_the_death_of_torchruns_agent_interrupts_its_rank() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, RANK],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "listens\n"
        agent.kill()
        output = agent.stdout.read()  # until the rank, which has inherited the pipe, ends too
    assert output == "stopping after this iteration is finished and saved; press Ctrl-C again to stop at once\n"


@pytest.mark.parametrize(
    ("rank", "line"), [("0", "ended before there was anything new to save; the same command starts again\n"), ("1", "")]
)
def test_ctrl_c_before_the_stage_handles_signals(
    rank: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> StageConfig:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setenv("RANK", rank)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits one that ignores it
    assert train.run(interrupted) == 130
    assert capsys.readouterr().err == line
