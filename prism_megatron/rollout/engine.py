"""The rollout engine: vLLM in this very process, laid over the training ranks.

Run on CPU, tensor parallelism 1 and 2. On GPU the same calls apply with NCCL; that is not verified. ``child.py`` runs
the same engine in processes of its own.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prism_megatron.convert.manifest import is_converted
from prism_megatron.data.images import decode_image
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import read_sizes
from prism_megatron.parallel.collectives import gather_over_ranks
from prism_megatron.rollout.progress import progress_bar
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.types import Rollout, RolloutRequest

# Never sampled: a response with one of these could not be scored, an image token has no image behind it.
_BANNED = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>")
_BAN = float("-inf")
_CUT_BY_ENGINE = {
    "text_config": ("num_attention_heads", "intermediate_size", "moe_intermediate_size"),
    "vision_config": ("num_heads", "intermediate_size"),
}
NO_WEIGHTS = "the rollout engine has no whole set of weights: none were pushed yet, or the last update was refused"
# What is kept of earlier requests: the first two are results of weights, the last is prepared pixels.
CACHES = ("prefix cache", "encoder cache", "multimodal cache")
_alive: list[Any] = []
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker puts one that does nothing in its place


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. ``kv_cache_gib`` is for CPU, ``gpu_memory_utilization`` and ``sleep_level`` for GPU.

    ``timeout_seconds`` is for one batch of responses, 0 for none; ``bucket_bytes`` and ``transport`` are for weights on
    their way to a child.
    """

    tensor_parallel_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: float
    gpu_memory_utilization: float
    enforce_eager: bool
    seed: int
    timeout_seconds: float = 0.0
    bucket_bytes: int = 256 << 20
    transport: str = "auto"
    sleep_level: int = 0
    images_per_prompt: int = 8


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int


class NoWeights(RuntimeError):
    """The engine was asked for responses while it could not give any."""


class RolloutEngine:
    """A vLLM engine on an HF checkpoint directory, whose weights can be replaced.

    All ranks of a tensor-parallel group make the same calls with the same arguments. The engine lives as long as the
    process: vLLM's own shutdown, finalizers included, ends the process groups it shares with the trainer.
    """

    def __init__(self, checkpoint: Path, config: EngineConfig) -> None:
        self._config = config
        check_engine(checkpoint, config)
        with _process_state_kept(), _uncollected():
            self.llm = _start(checkpoint, config)
        _alive.append(self.llm)
        tokenizer = self.llm.get_tokenizer()
        self._banned = {tokenizer.convert_tokens_to_ids(token): _BAN for token in _BANNED if token in tokenizer.vocab}
        self._has_weights = not is_converted(checkpoint)
        self._policy_version: int | None = None

    @property
    def banned_token_ids(self) -> list[int]:
        """What is never sampled."""
        return sorted(self._banned)

    @property
    def cache_block_tokens(self) -> int:
        """How many tokens of a prompt the prefix cache keeps together."""
        from prism_megatron.upstream.vllm import cache_block_tokens

        return cache_block_tokens(self.llm)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        report: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]:
        """``sampling.n`` responses to each request, in order; ``report`` is told how many requests are answered.

        Log-probabilities are those of the model's full distribution at the temperature it is sampled at (1 if greedy),
        whatever was masked for sampling: what the trainer computes. The same requests with the same seeds give the same
        responses.

        Raises UserError for a prompt that does not fit, NoWeights, and TimeoutError.
        """
        from vllm import SamplingParams

        if not self._has_weights:
            raise NoWeights(NO_WEIGHTS)

        prompts, parameters = [], []
        for request in requests:
            if len(request.prompt_token_ids) + sampling.max_tokens > self._config.max_model_len:
                raise UserError(
                    f"a prompt of {len(request.prompt_token_ids)} tokens and {sampling.max_tokens} response tokens do "
                    f"not fit max_model_len ({self._config.max_model_len}); raise rollout.max_model_len"
                )
            if len(request.images) > self._config.images_per_prompt:
                raise UserError(
                    f"a prompt has {len(request.images)} images, rollout.images_per_prompt is "
                    f"{self._config.images_per_prompt}; raise it"
                )
            images = [decode_image(data) for data in request.images]
            prompts.append({"prompt_token_ids": list(request.prompt_token_ids), "multi_modal_data": {"image": images}})
            parameters.append(
                SamplingParams(
                    n=sampling.n,
                    temperature=float(sampling.temperature > 0),
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=request.seed,
                    logprobs=0,
                    logit_bias=self._banned,
                )
            )
        with _process_state_kept(), progress_bar(len(requests)) if report is None else nullcontext(report) as report:
            self.llm.collective_rpc(_set_temperature, args=(sampling.temperature or 1.0,))
            answers = self._run(prompts, parameters, report)
        return [[_rollout(output, self._policy_version) for output in answer.outputs] for answer in answers]

    def _run(self, prompts: list[Any], parameters: list[Any], report: Callable[[int], None]) -> list[Any]:
        core, limit = self.llm.llm_engine, self._config.timeout_seconds
        deadline = time.monotonic() + (limit or float("inf"))
        unanswered = self.llm.enqueue(prompts, parameters, use_tqdm=False)
        answers: list[Any] = []
        while core.has_unfinished_requests():
            if time.monotonic() > deadline:
                core.abort_request(unanswered, internal=True)
                raise TimeoutError(
                    f"{len(answers)} of {len(prompts)} prompts were answered within rollout.timeout_seconds "
                    f"({limit:g}); raise it, or lower rollout.max_response_tokens"
                )
            for output in core.step():
                if output.finished:
                    answers.append(output)
                    report(len(answers))
        return sorted(answers, key=lambda answer: int(answer.request_id))

    def update_weights(self, named: Iterable[tuple[str, Tensor]], sync: WeightSync) -> None:
        """Replace all weights by ``named`` (HF names, full tensors) and forget everything computed with the old ones.

        Collective over all ranks. Raises UserError if ``named`` is not what the manifest of ``sync`` says or, with
        checksums, not the same on all ranks; the engine then refuses to generate until a complete update.
        """
        self._has_weights = False
        with _process_state_kept():
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"named": sync.checked(named)}})
            self.llm.finish_weight_update(str(sync.version))
            self.reset_caches()
        if sync.with_checksums:
            sync.check_agreement(sync.by_holder(gather_over_ranks(sync.checksums)))
        self._has_weights, self._policy_version = True, sync.version

    def sleep(self) -> None:
        """Give memory back until the engine is woken: the cache, and weights to the host (1) or altogether (2).

        Only on a GPU, and if ``sleep_level`` says so. Not verified on a GPU.
        """
        if self._config.sleep_level and torch.cuda.is_available() and not self.llm.llm_engine.is_sleeping():
            self.llm.sleep(self._config.sleep_level)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take the memory for ``part`` again: weights before an update, the cache after it, so that both fit."""
        torch.cuda.empty_cache()  # what the trainer keeps for itself is not free for the engine
        if torch.cuda.is_available() and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up([part])

    def differing_parameters(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Which of ``named``, all that was pushed, the engine computes with otherwise. Collective; in their order."""
        from prism_megatron.rollout.differences import differing_parameters
        from prism_megatron.upstream.vllm import engine_model

        with _process_state_kept():
            (found,) = self.llm.collective_rpc(lambda worker: differing_parameters(engine_model(worker), named))
        everybody = {place: name for rank in gather_over_ranks(found) for place, name in rank.items()}
        return [name for _, name in sorted(everybody.items())]

    def reset_caches(self, first: int = len(CACHES)) -> None:
        """Forget what is kept of earlier requests: the ``first`` so many of ``CACHES``."""
        for reset in list(self._resets().values())[:first]:
            reset()

    def _resets(self) -> dict[str, Callable[[], Any]]:
        llm = self.llm
        resets = llm.reset_prefix_cache, llm.llm_engine.reset_encoder_cache, llm.reset_mm_cache
        return dict(zip(CACHES, resets, strict=True))


def _set_temperature(worker: Any, temperature: float) -> None:
    """Scale the model's own logits. vLLM's samplers scale after they have noted the log-probabilities."""
    from prism_megatron.upstream.vllm import LogitsProcessor, engine_model

    for module in engine_model(worker).modules():
        if isinstance(module, LogitsProcessor):
            module.scale = 1 / temperature


def _rollout(output: Any, policy_version: int | None) -> Rollout:
    logprobs = tuple(step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True))
    finished = output.finish_reason == "stop"
    return Rollout(tuple(output.token_ids), logprobs, output.text, finished, policy_version)


def _start(checkpoint: Path, config: EngineConfig) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    sizes: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    sizes["enable_sleep_mode"] = config.sleep_level > 0
    if not torch.cuda.is_available():
        # vLLM rewinds the generator of a seeded request whose prompt it cuts, which a CPU generator cannot do.
        sizes = {"enable_chunked_prefill": False, "max_num_batched_tokens": 16 * config.max_model_len}
        _cpu_environment(config)
    from vllm import LLM

    from prism_megatron.rollout.transfer_backend import register
    from prism_megatron.upstream.vllm import keep_process_groups_at_exit

    with nullcontext() if torch.cuda.is_available() else _shared_memory_named():
        llm = LLM(
            model=str(checkpoint),
            # vLLM cannot read a directory converted for Megatron: its weights are pushed.
            load_format=_pushed_format() if is_converted(checkpoint) else "auto",
            dtype=config.dtype,
            hf_overrides=_overrides(checkpoint),
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            enforce_eager=config.enforce_eager,
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            limit_mm_per_prompt={"image": config.images_per_prompt, "video": 0},
            use_tqdm_on_load=False,
            logprobs_mode="raw_logprobs",
            weight_transfer_config={"backend": register()},
            seed=config.seed,
            **sizes,
        )
    keep_process_groups_at_exit(llm)
    llm.init_weight_transfer_engine({"init_info": {}})
    return llm


def _overrides(checkpoint: Path) -> dict[str, Any]:
    """Rotary settings in full: those left out of config.json have other defaults in vLLM than in transformers."""
    return {"text_config": {"rope_parameters": read_sizes(checkpoint).rotary.rope_parameters()}}


@contextmanager
def _shared_memory_named() -> Iterator[None]:
    """On a CPU vLLM's ranks meet in shared memory that is named alike for whatever torchrun starts on a host, and that
    killed ranks leave behind. Give it a name of its own while they meet, and no name afterwards."""
    from prism_megatron.upstream.vllm import rendezvous_at

    name = gather_over_ranks(f"prism_{os.getpid()}_{time.time_ns()}")[0]
    with rendezvous_at(f"env://:{name}", int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])):
        yield
    gather_over_ranks(name)  # all have it
    for path in Path("/dev/shm").glob(f"{name}*"):
        path.unlink(missing_ok=True)


def _pushed_format() -> str:
    """A vLLM load format that reads nothing. Its own, "dummy", also overwrites what no checkpoint brings back: the
    means and deviations that images are normalised with."""
    from prism_megatron.upstream.vllm import BaseModelLoader, register_model_loader

    class NothingYet(BaseModelLoader):
        def download_model(self, model_config: Any) -> None: ...

        def load_weights(self, model: Any, model_config: Any) -> None: ...

    register_model_loader("pushed")(NothingYet)
    return "pushed"


def _cpu_environment(config: EngineConfig) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.kv_cache_gib)))
    # Threads bound to cores spin against the trainer's own; a tensor-parallel engine must be told its cores.
    cores = sorted(os.sched_getaffinity(0))
    bind = "nobind" if config.tensor_parallel_size == 1 else "|".join(map(str, cores[: config.tensor_parallel_size]))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """vLLM sets the thread count, the global random state and LD_PRELOAD of whatever process it runs in."""
    threads, random_state, preload = torch.get_num_threads(), torch.get_rng_state(), os.environ.get("LD_PRELOAD")
    try:
        yield
    finally:
        torch.set_num_threads = _set_num_threads
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage while an engine starts: imports make many objects to look through, and none that goes.

    vLLM collects after each part of the model, and freezes all objects in the end. Those from before are frozen now.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_engine(checkpoint: Path, config: EngineConfig) -> None:
    """Refuse a checkpoint that is none, or an engine that it cannot be cut for. Raises UserError."""
    sizes = read_sizes(checkpoint)
    written = {"text_config": sizes.text, "vision_config": sizes.vision}
    ranks = config.tensor_parallel_size
    for part, names in _CUT_BY_ENGINE.items():
        for name in names:
            size = written[part].get(name, 0)  # a dense model has no experts
            if size % ranks:
                raise UserError(
                    f"{name} ({size}) of {part} must be divisible by rollout.tensor_model_parallel_size ({ranks})"
                )
    groups = written["text_config"]["num_key_value_heads"]
    if groups % ranks and ranks % groups:
        raise UserError(
            f"num_key_value_heads ({groups}) must be a multiple of rollout.tensor_model_parallel_size ({ranks}) or "
            "divide it, so that a rank has whole heads, or one that others have too"
        )
    section, head_dim = sizes.rotary.mrope_section, sizes.text["head_dim"]
    if 2 * sum(section) != head_dim:
        raise UserError(
            f"{checkpoint}/config.json: mrope_section {list(section)} must add up to half of head_dim ({head_dim}) for "
            "vLLM; write this model's own there"
        )
