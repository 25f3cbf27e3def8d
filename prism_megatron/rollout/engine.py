"""vLLM inside the training ranks: each rank is one of the engine's tensor-parallel workers.

Verified on CPU with tensor parallelism 1 and 2, not on a GPU. ``subprocess_engine.py`` runs the same engine in
subprocesses.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prism_megatron.convert.manifest import is_converted
from prism_megatron.data.images import decode_image
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import read_sizes
from prism_megatron.observe.progress import ProgressBar
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_ranks
from prism_megatron.rollout.interface import CACHES, NO_WEIGHTS, EngineConfig, NoWeights, Sampling
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.types import Rollout, RolloutRequest

# Never sampled: the trainer cannot score a response with one of these, since there is no image for an image token.
_BANNED = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>")
_BAN = float("-inf")
_SPLIT_BY_ENGINE = {
    "text_config": ("num_attention_heads", "intermediate_size", "moe_intermediate_size"),
    "vision_config": ("num_heads", "intermediate_size"),
}
_engines: list[Any] = []  # referenced until the process ends
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a function that does nothing


class RolloutEngine:
    """The engine of this process (see :class:`~prism_megatron.rollout.interface.Engine`), on an HF checkpoint.

    All ranks of an engine make the same calls with the same arguments. It exists until the process ends: vLLM's
    shutdown and finalizers destroy the process groups that it shares with the trainer.
    """

    def __init__(self, checkpoint: Path, config: EngineConfig) -> None:
        self._config = config
        check_engine(checkpoint, config)
        with _process_state_restored(), _garbage_collection_paused():
            self.llm = _start(checkpoint, config)
        _engines.append(self.llm)
        tokenizer = self.llm.get_tokenizer()
        self._banned = {tokenizer.convert_tokens_to_ids(token): _BAN for token in _BANNED if token in tokenizer.vocab}
        self._has_weights = not is_converted(checkpoint)
        self._policy_version: int | None = None

    @property
    def banned_token_ids(self) -> list[int]:
        """Return the tokens that are never sampled."""
        return sorted(self._banned)

    @property
    def cache_block_tokens(self) -> int:
        """Return the number of tokens in a block of the prefix cache."""
        from prism_megatron.upstream.vllm import cache_block_tokens

        return cache_block_tokens(self.llm)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        report: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]:
        """Sample responses to each request (:meth:`Engine.generate`)."""
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
        show = report is None and groups.is_main_rank()
        bar = ProgressBar("rollout", len(requests), is_transient=True, is_enabled=show)
        with _process_state_restored(), bar:
            self.llm.collective_rpc(_set_temperature, args=(sampling.temperature or 1.0,))
            answers = self._run(prompts, parameters, report or bar.update)
        return [[_rollout(output, self._policy_version) for output in answer.outputs] for answer in answers]

    def _run(self, prompts: list[Any], parameters: list[Any], report: Callable[[int], None]) -> list[Any]:
        core, limit = self.llm.llm_engine, self._config.timeout_seconds
        deadline = float("inf") if limit is None else time.monotonic() + limit
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
        """Replace all weights (:meth:`Engine.update_weights`)."""
        self._has_weights = False
        with _process_state_restored():
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"named": sync.checked(named)}})
            self.llm.finish_weight_update(str(sync.version))
            self.reset_caches()
        if sync.with_checksums:
            sync.check_agreement(sync.by_receiver(gather_over_ranks(sync.checksums)))
        self._has_weights, self._policy_version = True, sync.version

    def sleep(self) -> None:
        """Release GPU memory until :meth:`wake`. Not verified on a GPU; does nothing without one."""
        if self._config.sleep_level and torch.cuda.is_available() and not self.llm.llm_engine.is_sleeping():
            self.llm.sleep(self._config.sleep_level)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Allocate the memory of ``part`` again."""
        torch.cuda.empty_cache()  # the engine cannot allocate what torch caches for the trainer
        if torch.cuda.is_available() and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up([part])

    def differing_parameters(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names that the engine has other values for (:meth:`Engine.differing_parameters`)."""
        from prism_megatron.rollout.weight_diff import differing_parameters
        from prism_megatron.upstream.vllm import engine_model

        with _process_state_restored():
            (found,) = self.llm.collective_rpc(lambda worker: differing_parameters(engine_model(worker), named))
        of_all_ranks = {index: name for rank in gather_over_ranks(found) for index, name in rank.items()}
        return [name for _, name in sorted(of_all_ranks.items())]

    def reset_caches(self, first: int = len(CACHES)) -> None:
        """Reset the ``first`` caches of ``CACHES``."""
        for reset in list(self._resets().values())[:first]:
            reset()

    def _resets(self) -> dict[str, Callable[[], Any]]:
        llm = self.llm
        resets = llm.reset_prefix_cache, llm.llm_engine.reset_encoder_cache, llm.reset_mm_cache
        return dict(zip(CACHES, resets, strict=True))


def _set_temperature(worker: Any, temperature: float) -> None:
    """Scale the model's logits. vLLM's samplers scale too late: they record log-probabilities before."""
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
        # With chunked prefill vLLM rewinds the generator of a seeded request, which a CPU generator cannot do.
        sizes = {"enable_chunked_prefill": False, "max_num_batched_tokens": 16 * config.max_model_len}
        _cpu_environment(config)
    from vllm import LLM

    from prism_megatron.rollout.transfer_backend import register
    from prism_megatron.upstream.vllm import keep_process_groups_at_exit

    with nullcontext() if torch.cuda.is_available() else _unique_shared_memory():
        llm = LLM(
            model=str(checkpoint),
            # vLLM cannot read a directory in Megatron's format; its weights are pushed.
            load_format=_register_empty_format() if is_converted(checkpoint) else "auto",
            dtype=config.dtype,
            hf_overrides=_overrides(checkpoint),
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            enforce_eager=config.enforce_eager,
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            limit_mm_per_prompt={"image": config.images_per_prompt, "video": 0},
            mm_processor_kwargs=_pixel_limits(config),
            use_tqdm_on_load=False,
            logprobs_mode="raw_logprobs",
            weight_transfer_config={"backend": register()},
            seed=config.seed,
            **sizes,
        )
    keep_process_groups_at_exit(llm)
    llm.init_weight_transfer_engine({"init_info": {}})
    return llm


def _pixel_limits(config: EngineConfig) -> dict[str, int] | None:
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    return {name: limit for name, limit in limits.items() if limit} or None


def _overrides(checkpoint: Path) -> dict[str, Any]:
    """Spell out all rotary settings: vLLM's defaults for those missing in config.json differ from transformers'."""
    return {"text_config": {"rope_parameters": read_sizes(checkpoint).rotary.rope_parameters()}}


@contextmanager
def _unique_shared_memory() -> Iterator[None]:
    """Give the shared memory of vLLM's CPU ranks a unique name while they meet, and unlink it afterwards.

    vLLM's name is the same for all engines of a host, and stays behind when ranks are killed.
    """
    from prism_megatron.upstream.vllm import rendezvous_at

    name = gather_over_ranks(f"prism_{os.getpid()}_{time.time_ns()}")[0]
    with rendezvous_at(f"env://:{name}", int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])):
        yield
    gather_over_ranks(name)  # all have opened it
    for path in Path("/dev/shm").glob(f"{name}*"):
        path.unlink(missing_ok=True)


def _register_empty_format() -> str:
    """Register a vLLM load format that reads nothing, and return its name.

    vLLM's "dummy" also overwrites buffers that no push restores: the mean and deviation of image normalisation.
    """
    from prism_megatron.upstream.vllm import BaseModelLoader, register_model_loader

    class NoWeightsLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None: ...

        def load_weights(self, model: Any, model_config: Any) -> None: ...

    register_model_loader("pushed")(NoWeightsLoader)
    return "pushed"


def _cpu_environment(config: EngineConfig) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.kv_cache_gib)))
    # Bound threads would compete with the trainer's for a core; with tensor parallelism vLLM requires a binding.
    cores = sorted(os.sched_getaffinity(0))
    bind = "nobind" if config.tensor_parallel_size == 1 else "|".join(map(str, cores[: config.tensor_parallel_size]))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind


@contextmanager
def _process_state_restored() -> Iterator[None]:
    """Restore what vLLM changes in its process: thread count, global random state and LD_PRELOAD."""
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
def _garbage_collection_paused() -> Iterator[None]:
    """Collect no garbage while an engine starts: its imports create many objects, and nothing to free.

    vLLM collects after each part of the model and freezes all objects at the end; existing ones are frozen here.
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
    """Raise UserError if the directory is no checkpoint or cannot be split over the engine's ranks."""
    sizes = read_sizes(checkpoint)
    written = {"text_config": sizes.text, "vision_config": sizes.vision}
    ranks = config.tensor_parallel_size
    for part, names in _SPLIT_BY_ENGINE.items():
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
            "divide it, so that each rank has complete key-value heads, or a copy of one"
        )
    section, head_dim = sizes.rotary.mrope_section, sizes.text["head_dim"]
    if 2 * sum(section) != head_dim:
        raise UserError(
            f"{checkpoint}/config.json: mrope_section {list(section)} must add up to half of head_dim ({head_dim}) for "
            "vLLM; correct it there"
        )
