"""The interface of rollout engines, which stages call: in this process (``engine.py``) or in subprocesses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.types import Rollout, RolloutRequest

NO_WEIGHTS = "the rollout engine has no complete set of weights: none was pushed, or the last update was refused"
# In the order of Engine.reset_caches. The first two hold results computed with the weights, the last prepared pixels.
CACHES = ("prefix cache", "encoder cache", "multimodal cache")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        tensor_parallel_size: ranks that one copy of the weights is split over.
        kv_cache_gib: size of the KV cache on a CPU; on a GPU, ``gpu_memory_utilization`` gives it.
        timeout_seconds: limit for one batch of responses; None for no limit.
        bucket_bytes: memory through which weights reach the subprocesses of an engine.
        transport: way of the weights to the subprocesses of an engine (``transport.py``).
        min_pixels, max_pixels: limits that images are scaled to; None for those of the checkpoint.
        sleep_level: 0 never sleeps, 1 moves weights to the host, 2 drops them; on a GPU only.
    """

    tensor_parallel_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: float
    gpu_memory_utilization: float
    enforce_eager: bool
    seed: int
    timeout_seconds: float | None = None
    bucket_bytes: int = 256 << 20
    transport: str = "auto"
    sleep_level: int = 0
    images_per_prompt: int = 8
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class Sampling:
    """Sampling of ``n`` responses to each request; ``temperature`` 0 is greedy."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int


class NoWeights(RuntimeError):
    """The engine was asked for responses while it had no complete set of weights."""


class Engine(Protocol):
    """A vLLM engine whose weights can be replaced. All ranks that share it make the same calls."""

    @property
    def banned_token_ids(self) -> list[int]:
        """Tokens that are never sampled."""

    @property
    def cache_block_tokens(self) -> int:
        """Number of tokens in a block of the prefix cache."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        report: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]:
        """Sample responses to each request, in order. The same requests with the same seeds give the same responses.

        Log-probabilities are those of the model's full distribution at the sampling temperature (1 if greedy), before
        any masking for sampling: what the trainer computes.

        Args:
            requests: prompts with their images and seeds.
            sampling: settings of the whole batch.
            report: called with the number of finished requests; by default a progress bar.

        Raises:
            UserError: a prompt does not fit.
            NoWeights: there is no complete set of weights.
            TimeoutError, EngineDied: the batch took longer than ``timeout_seconds``, or the engine died again after
                its restart.
        """

    def update_weights(self, named: Iterable[tuple[str, Tensor]], sync: WeightSync) -> None:
        """Replace all weights by ``named`` (HF names, full tensors) and reset all caches. Collective over all ranks.

        Raises UserError if ``named`` differs from the manifest of ``sync`` or, with checksums, between ranks. The
        engine then refuses to generate until a complete update.
        """

    def reset_caches(self, first: int = len(CACHES)) -> None:
        """Reset the ``first`` caches of ``CACHES``."""

    def sleep(self) -> None:
        """Release GPU memory until :meth:`wake`: the KV cache, and the weights as ``sleep_level`` says."""

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Allocate the memory of ``part`` again: weights before an update, the KV cache after it, so that both fit."""

    def differing_parameters(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of ``named``, all that was pushed, that the engine computes with other values for. Collective."""
