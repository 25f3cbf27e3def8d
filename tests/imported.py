"""Imports of the fork server of ``tests/ranks.py``, in the order of a real rank."""

from __future__ import annotations

from prism_megatron.parallel import cpu

cpu.install()

import tensorboard.summary  # noqa: E402
import transformers  # noqa: E402
from vllm import LLM  # noqa: E402

import recipes  # noqa: E402
from prism_megatron.rollout import engine  # noqa: E402
from prism_megatron.stages import align, collect, rlvr, sft, warmup  # noqa: E402

__all__ = ["LLM", "align", "collect", "engine", "recipes", "rlvr", "sft", "tensorboard", "transformers", "warmup"]
