"""Speed on a GPU: training steps, HF's on the same rows, scoring, and the weight sync to vLLM."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prism_megatron.config import ModelConfig, ParallelConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.observe.flops import peak_flops, training_flops
from tools.bench import discriminator as discriminator_bench
from tools.bench import harness, hf_step
from tools.gpu_check import models
from tools.gpu_check.models import Scale, Variants

_LR = 1e-5
Step = Callable[[Sequence[TrainingSequence]], float]


def train(scale: Scale) -> Variants:
    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    checkpoint = models.full_size(scale)
    for precision in (ModelConfig("", scale.precision), *scale.alternatives()):
        model = replace(precision, recompute=True)
        yield models.label(model), partial(time_trainer, checkpoint, model, scale)
    yield from models.fp8_settings(scale)
    groups.shutdown()


def time_trainer(checkpoint: Path, model: ModelConfig, scale: Scale) -> dict[str, Any]:
    """Time the trainer's SFT step at ``model``'s precision."""
    from prism_megatron.observe import metrics
    from prism_megatron.stages.batcher import Batcher
    from prism_megatron.stages.policy import sft_step

    if reason := models.unsupported(model):
        return {"needs": reason}
    config, processor = models.sft_config(checkpoint, model, _LR), ChatProcessor(checkpoint)
    policy = models.random_policy(config)
    batcher = Batcher.from_config(processor.input_spec, config)

    def step(batch: Sequence[TrainingSequence]) -> float:
        loss = sft_step(policy, batcher.sft(batch, models.sample_ids(batch)), _LR)[metrics.LOSS]
        assert loss is not None
        return loss

    return timed(step, checkpoint, processor, scale, with_hfu=True)


def train_hf(scale: Scale) -> Variants:
    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    yield "hf", partial(time_hf, models.full_size(scale), scale)
    groups.shutdown()


def time_hf(checkpoint: Path, scale: Scale) -> dict[str, Any]:
    """Time HF's model as its trainer runs it: float32 weights, BF16 autocast (not in a dry run), torch's AdamW.

    Layers are recomputed, like the trainer's, and the vision tower's as well.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from prism_megatron.parallel import groups

    processor = ChatProcessor(checkpoint)
    torch.manual_seed(1)
    with groups.device():
        hf = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(checkpoint), dtype=torch.float32)
    hf.gradient_checkpointing_enable()
    config = models.sft_config(checkpoint, ModelConfig("", scale.precision), _LR)
    step = hf_step.hf_step(config, processor.input_spec, hf.train())
    return timed(step, checkpoint, processor, scale, with_hfu=False)


def timed(step: Step, checkpoint: Path, processor: ChatProcessor, scale: Scale, *, with_hfu: bool) -> dict[str, Any]:
    """Measure tokens and operations per second of ``step``, without padding.

    HFU counts the recomputed operations of the trainer's step: decoder layers and logits.
    """
    from prism_megatron.model.sizes import read_sizes
    from prism_megatron.stages.batcher import workload

    steps, warmup, rows = (2, 1, 2) if scale.dry else (10, 3, models.ROWS)
    batch, sizes = models.rows_with_images(processor, scale, rows), read_sizes(checkpoint)
    losses: list[float] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = harness.interleaved({"step": lambda _: losses.append(step(batch))}, steps, warmup)["step"]
    median, tokens = statistics.median(seconds), sum(map(len, batch))
    flops = training_flops(sizes.text, sizes.vision, workload(batch), recompute=True)
    rate = flops.model / median
    most = peak_flops(harness.provenance()["hardware"])
    layers = sizes.text["num_hidden_layers"]
    return {
        "layers": layers,
        "note": None if scale.dry else models.note_on_depth(layers),
        "rows": rows,
        "image_patches": [len(row.prompt.visuals[0].patches) for row in batch],
        "tokens": tokens,
        "step_seconds": harness.median_and_p90(seconds),
        "tokens_per_second": tokens / median,
        "tflops": rate / 1e12,
        "mfu_of_bf16_peak": rate / most if most else None,
        "hfu_of_bf16_peak": flops.hardware / median / most if most and with_hfu else None,
        "peak_bytes": harness.peak_bytes(),
        "losses": losses,
    }


def discriminator(scale: Scale) -> Variants:
    for precision in ("fp32", "bf16") if scale.dry else ("bf16",):
        sizes, samples = ({}, 2) if scale.dry else (scale.shallow(2), 16)
        folder = scale.folder / precision
        settings = discriminator_bench.Settings("tiny_align", samples, 2, 2, precision, sizes)
        yield precision, partial(discriminator_bench.measure, settings, folder)


def sync(scale: Scale) -> Variants:
    yield "vllm", partial(weights_to_vllm, scale)


def weights_to_vllm(scale: Scale) -> dict[str, Any]:
    if importlib.util.find_spec("vllm") is None:
        return {"needs": "vLLM"}
    from tools.bench import sync as sync_bench

    hidden, layers = (128, 2) if scale.dry else (2560, 4)
    return sync_bench.measure(
        sync_bench.Settings(hidden, layers, bucket_mib=128, checksums=False, steps=2), scale.folder
    )


PARTS: dict[str, Callable[[Scale], Variants]] = {
    "train": train,
    "train_hf": train_hf,
    "discriminator": discriminator,
    "sync": sync,
}
