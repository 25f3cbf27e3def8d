"""Benchmark sampling with the colocated and the child-process engine, by batch size, and their share of an RLVR step.

    python -m tools.bench.rollout [--prompts 1,4,16 --samples 8 --tokens 128] [--hidden 512 --layers 8] [--out NEW.json]

Both engines have the same weights and answer the same prompts with the same seeds alternately; their tokens must be the
same. RLVR steps of the largest batch follow, alternately too: weight sync, sampling, policy update. ``peak_bytes`` are
of the rank, which trains and has the colocated engine; ``peak_bytes_of_child`` are resident on the host. One rank; an
untrained decoder of the requested size with the tiny model's vocabulary and vision tower.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

from prism_megatron.config import RLVRConfig, apply_overrides
from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from recipes import STAGE_RECIPES
from tools.bench import harness

_PARTS = ("sync", "rollout", "train")
Batch = Sequence[tuple[int, ...]]  # token ids of the responses


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement: ``prompts`` are the batch sizes, ``tokens`` the limit of a response."""

    prompts: tuple[int, ...]
    samples: int
    tokens: int
    hidden: int
    layers: int
    steps: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="1,4,16", help="batch sizes in prompts")
    parser.add_argument("--samples", type=int, default=8, help="responses per prompt")
    parser.add_argument("--tokens", type=int, default=128, help="maximal length of a response")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of the decoder")
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder")
    parser.add_argument("--steps", type=int, default=3, help="measured batches per size, and RLVR steps; at least 2")
    harness.add_output_options(parser)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.prompts.split(",") if size.strip().isdigit()]
    if arguments.steps < 2 or not sizes or min(sizes) < 1:
        print(
            f"error: --steps ({arguments.steps}) must be at least 2 for a median and a p90, and --prompts "
            f"({arguments.prompts}) numbers like 1,4,16",
            file=sys.stderr,
        )
        return 2
    numbers = (arguments.samples, arguments.tokens, arguments.hidden, arguments.layers, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Settings(tuple(sorted(sizes)), *numbers), Path(folder))
    return harness.finish(result, arguments, [f"colocated.{size}.tokens_per_second" for size in sizes])


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure tokens per second of each engine by batch size, and the seconds of an RLVR step by part."""
    from prism_megatron.parallel import groups

    config = prepare(settings, folder)
    groups.initialize(config.parallel, seed=1)
    from prism_megatron.data.dataset import read_rlvr
    from prism_megatron.stages.rollouts import start_engine
    from prism_megatron.stages.setup import load_policy, load_processor

    rows, processor, policy = read_rlvr(Path(config.data)), load_processor(config), load_policy(config)
    kinds = {kind: replace(config, rollout=replace(config.rollout, engine=kind)) for kind in ("child", "colocated")}
    engines = {kind: start_engine(each, policy.source) for kind, each in kinds.items()}

    result: dict[str, Any] = {"benchmark": "rollout", "config": asdict(settings), "ranks": 1, **harness.provenance()}
    result |= {kind: {} for kind in engines} | {"step": {}}
    for size in settings.prompts:
        for kind, measured in sampling(engines, processor, rows[:size], config, settings.steps).items():
            result[kind][str(size)] = measured
    parts: dict[str, list[dict[str, float]]] = {kind: [] for kind in engines}

    def train(kind: str, number: int) -> None:
        largest = rows[: settings.prompts[-1]]
        parts[kind].append(step(engines[kind], policy, processor, largest, config, number))

    harness.interleaved({kind: partial(train, kind) for kind in engines}, settings.steps, warmup=1)
    result["step"] = {kind: shares(steps[1:]) for kind, steps in parts.items()}
    result |= {"peak_bytes": harness.peak_bytes(), "peak_bytes_of_child": harness.peak_bytes_of_children()}
    groups.shutdown()
    return result


def sampling(
    engines: Mapping[str, Any], processor: Any, rows: Sequence[Any], config: RLVRConfig, steps: int
) -> dict[str, dict[str, Any]]:
    """Measure tokens per second and seconds of each engine on one batch of prompts."""
    from prism_megatron.stages.rollouts import Sampler

    generated: dict[str, list[Batch]] = {kind: [] for kind in engines}

    def sample(kind: str, number: int) -> None:
        samples = Sampler(engines[kind], processor, config).sample(rows, number)
        generated[kind].append([sample.rollout.token_ids for sample in samples])

    seconds = harness.interleaved({kind: partial(sample, kind) for kind in engines}, steps, warmup=1)
    check_same(generated)
    tokens = [sum(map(len, batch)) for batch in generated["colocated"][1:]]
    return {
        kind: {
            "tokens_per_second": statistics.median(map(truediv, tokens, values)),
            "seconds": harness.median_and_p90(values),
        }
        for kind, values in seconds.items()
    }


def check_same(generated: Mapping[str, Sequence[Batch]]) -> None:
    """Raise RuntimeError if the engines' token ids of a batch differ."""
    for number, (child, colocated) in enumerate(zip(generated["child"], generated["colocated"], strict=True)):
        for response, (one, other) in enumerate(zip(child, colocated, strict=True)):
            if one != other:
                raise RuntimeError(
                    f"both engines must give the same tokens; of batch {number}, response {response} is {one} from the "
                    f"child process and {other} inside the rank"
                )


def prepare(settings: Settings, folder: Path) -> RLVRConfig:
    """Make model and data in ``folder``, and return the recipe's configuration on them."""
    from recipes.tiny_model import make_tiny_model

    text = {"hidden_size": settings.hidden, "intermediate_size": 3 * settings.hidden}
    text |= {"num_hidden_layers": settings.layers}
    vision = {"out_hidden_size": settings.hidden}
    make_tiny_model(folder / "base", seed=1, overrides={"text_config": text, "vision_config": vision})
    count = settings.prompts[-1]
    write_shapes_data(folder / "data", ShapesConfig(sft_rows=1, alignment_rows=1, rlvr_rows=count, heldout_rows=count))
    overrides = [f"model.hf_checkpoint={folder}/base", f"data={folder}/data/heldout.parquet", f"run.dir={folder}/runs"]
    overrides += [f"rollout.samples_per_prompt={settings.samples}", f"rollout.max_response_tokens={settings.tokens}"]
    overrides += [f"rollout.max_model_len={settings.tokens + 256}", "rollout.max_logprob_abs_diff=1e9"]
    config = apply_overrides(STAGE_RECIPES["tiny_rlvr"](), overrides)
    assert isinstance(config, RLVRConfig)
    return config


def step(
    engine: Any, policy: Any, processor: Any, rows: Sequence[Any], config: RLVRConfig, number: int
) -> dict[str, float]:
    """Run one RLVR step. Returns seconds by part. Advantages are synthetic, since no answer is correct."""
    from prism_megatron.stages.batcher import Batcher
    from prism_megatron.stages.policy import policy_gradient_step
    from prism_megatron.stages.rollouts import Sampler, push_weights

    times = [time.perf_counter()]
    push_weights(engine, policy, number, config.rollout)
    times.append(time.perf_counter())
    samples = Sampler(engine, processor, config).sample(rows, number)
    times.append(time.perf_counter())
    advantages = [float((-1) ** index) for index in range(len(samples))]
    batches = Batcher.from_config(processor.input_spec, config).policy(samples, advantages, config, number)
    policy_gradient_step(policy, None, batches, config, 1e-6)
    times.append(time.perf_counter())
    return {part: end - start for part, start, end in zip(_PARTS, times, times[1:], strict=False)}


def shares(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return median seconds by part, and the engine's share of their sum."""
    medians = {part: statistics.median(step[part] for step in steps) for part in _PARTS}
    share = (medians["sync"] + medians["rollout"]) / sum(medians.values())
    return {f"{part}_seconds": seconds for part, seconds in medians.items()} | {"engine_share": share}


if __name__ == "__main__":
    sys.exit(main())
