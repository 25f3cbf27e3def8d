"""Imports of the fork server of ``tests/ranks.py``, in the order of a real rank."""

from __future__ import annotations

import tensorboard.summary
import transformers
from vllm import LLM

import recipes
from prism_megatron.rollout import engine
from prism_megatron.stages import align, collect, rlvr, sft, warmup

__all__ = ["LLM", "align", "collect", "engine", "recipes", "rlvr", "sft", "tensorboard", "transformers", "warmup"]
