"""The rollout engine: vLLM in this very process, laid over the training ranks. The only file that knows vLLM.

Run on CPU, tensor parallelism 1 and 2. On GPU the same calls apply with NCCL; that is not verified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.convert.native import is_converted
from prism_megatron.data.chat import decode_image
from prism_megatron.parallel.collectives import gather_over_ranks
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.types import Rollout, RolloutRequest

# Never sampled: a response with one of these could not be scored, an image token has no image behind it.
_BANNED = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>")
_BAN = -100.0  # vLLM's largest negative logit bias
_CUT_BY_ENGINE = {
    "text_config": ("num_attention_heads", "intermediate_size", "moe_intermediate_size"),
    "vision_config": ("num_heads", "intermediate_size"),
}
_alive: list[Any] = []
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker puts one that does nothing in its place


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. ``kv_cache_gib`` is for CPU, ``gpu_memory_utilization`` for GPU."""

    tensor_parallel_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: float
    gpu_memory_utilization: float
    enforce_eager: bool
    seed: int


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int


class RolloutEngine:
    """A vLLM engine on an HF checkpoint directory, whose weights can be replaced.

    All ranks of a tensor-parallel group make the same calls with the same arguments. The engine lives as long as the
    process: vLLM's own shutdown, finalizers included, ends the process groups it shares with the trainer.
    """

    def __init__(self, checkpoint: Path, config: EngineConfig) -> None:
        self._config = config
        _check(checkpoint, config)
        with _process_state_kept():
            self._llm = _start(checkpoint, config)
        _alive.append(self._llm)
        self._llm.llm_engine.engine_core._finalizer.atexit = False
        tokenizer = self._llm.get_tokenizer()
        self._banned = {tokenizer.convert_tokens_to_ids(token): _BAN for token in _BANNED if token in tokenizer.vocab}
        self._has_weights = not is_converted(checkpoint)
        self._policy_version: int | None = None

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[list[Rollout]]:
        """``sampling.n`` responses to each request, in order.

        Log-probabilities are those of the model's full distribution at temperature 1, whatever was masked or scaled for
        sampling: what the trainer computes. The same requests with the same seeds give the same responses.
        """
        from vllm import SamplingParams

        if not self._has_weights:
            raise RuntimeError(
                "the rollout engine has no whole set of weights: none were pushed yet, or the last update was refused"
            )

        prompts, parameters = [], []
        for request in requests:
            if len(request.prompt_token_ids) + sampling.max_tokens > self._config.max_model_len:
                raise ValueError(
                    f"a prompt of {len(request.prompt_token_ids)} tokens and {sampling.max_tokens} response tokens do "
                    f"not fit max_model_len ({self._config.max_model_len}); raise rollout.max_model_len"
                )
            images = [decode_image(data) for data in request.images]
            prompts.append({"prompt_token_ids": list(request.prompt_token_ids), "multi_modal_data": {"image": images}})
            parameters.append(
                SamplingParams(
                    n=sampling.n,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=request.seed,
                    logprobs=0,
                    logit_bias=self._banned,
                )
            )
        with _process_state_kept():
            answers = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [[_rollout(output, self._policy_version) for output in answer.outputs] for answer in answers]

    def update_weights(self, named: Iterable[tuple[str, Tensor]], sync: WeightSync) -> None:
        """Replace all weights by ``named`` (HF names, full tensors) and forget everything computed with the old ones.

        Collective over all ranks. Raises ValueError if ``named`` is not what the manifest of ``sync`` says or, with
        checksums, not the same on all ranks; the engine then refuses to generate until a complete update.
        """
        self._has_weights = False
        with _process_state_kept():
            self._llm.collective_rpc(_reload, args=(sync.checked(named),))
            # The scheduler's caches hold results of the old weights: prefixes, and encodings of images already seen.
            self._llm.reset_prefix_cache()
            self._llm.llm_engine.reset_encoder_cache()
            self._llm.reset_mm_cache()
        if sync.with_checksums:
            sync.check_agreement(gather_over_ranks(sync.checksums))
        self._llm.llm_engine.engine_core.set_weight_version(str(sync.version))
        self._has_weights, self._policy_version = True, sync.version


def _reload(worker: Any, named: Iterator[tuple[str, Tensor]]) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    worker.reload_weights(weights_iterator=named)
    # An output layer tied to the embedding gets no weights of its own, so the reload leaves alone the packed copy that
    # CPU kernels made of it: every logit would come from the weights of the first load.
    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _rollout(output: Any, policy_version: int | None) -> Rollout:
    logprobs = tuple(step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True))
    finished = output.finish_reason == "stop"
    return Rollout(tuple(output.token_ids), logprobs, output.text, finished, policy_version)


def _start(checkpoint: Path, config: EngineConfig) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    sizes: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if not torch.cuda.is_available():
        # vLLM rewinds the generator of a seeded request whose prompt it cuts, which a CPU generator cannot do.
        sizes = {"enable_chunked_prefill": False, "max_num_batched_tokens": 16 * config.max_model_len}
        _cpu_environment(config)
    from vllm import LLM

    return LLM(
        model=str(checkpoint),
        # vLLM cannot read a directory converted for Megatron: its weights are pushed.
        load_format=_pushed_format() if is_converted(checkpoint) else "auto",
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend="external_launcher",
        limit_mm_per_prompt={"image": 8, "video": 0},
        use_tqdm_on_load=False,
        logprobs_mode="raw_logprobs",
        seed=config.seed,
        **sizes,
    )


def _pushed_format() -> str:
    """A vLLM load format that reads nothing. Its own, "dummy", also overwrites what no checkpoint brings back: the
    means and deviations that images are normalised with."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

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


def _check(checkpoint: Path, config: EngineConfig) -> None:
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no config.json; give the directory of an HF checkpoint")
    written = json.loads(path.read_text())
    ranks = config.tensor_parallel_size
    for part, names in _CUT_BY_ENGINE.items():
        for name in names:
            size = written[part].get(name, 0)  # a dense model has no experts
            if size % ranks:
                raise ValueError(
                    f"{name} ({size}) of {part} must be divisible by rollout.tensor_model_parallel_size ({ranks})"
                )
    groups = written["text_config"]["num_key_value_heads"]
    if groups % ranks and ranks % groups:
        raise ValueError(
            f"num_key_value_heads ({groups}) must be a multiple of rollout.tensor_model_parallel_size ({ranks}) or "
            "divide it, so that a rank has whole heads, or one that others have too"
        )
