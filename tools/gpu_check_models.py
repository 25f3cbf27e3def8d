"""Models, rows and precisions of ``tools/gpu_check.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prism_megatron.config import FP8Config, ModelConfig, OptimizerConfig, SFTConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.stages.setup import Trained
from prism_megatron.types import EncodedPrompt, InputSpec, Visual
from recipes.tiny import tiny_sft
from tools.make_tiny_model import make_tiny_model

Variants = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
_PUBLISHED = Path(__file__).resolve().parents[1] / "recipes" / "published" / "4b.json"
_TEXT_TOKENS = 32  # around an image that is made up
_INIT_STD = 0.02


@dataclass(frozen=True)
class Scale:
    """How large everything is. ``layers`` is the depth of the decoder whose speed is measured."""

    dry: bool
    layers: int
    folder: Path

    @property
    def precision(self) -> str:
        """What FP8 is compared with; on a dry run float32, which BF16 is compared with."""
        return "fp32" if self.dry else "bf16"

    def cut(self, layers: int) -> dict[str, dict[str, Any]]:
        """4B's widths at a depth and vocabulary that are soon written, as ``make_tiny_model`` takes them."""
        if self.dry:
            return {"text_config": {"num_hidden_layers": layers}}
        text, vision = published()
        vision |= {"depth": 2, "deepstack_visual_indexes": [0, 1]}
        return {"text_config": text | {"num_hidden_layers": layers, "vocab_size": 8192}, "vision_config": vision}

    def rivals(self) -> list[ModelConfig]:
        """What is compared with ``precision``: every FP8 recipe this GPU has, BF16 on a dry run."""
        if self.dry:
            return [ModelConfig("", "bf16")]
        return [ModelConfig("", "fp8", FP8Config(recipe)) for recipe in RECIPES]


def published() -> tuple[dict[str, Any], dict[str, Any]]:
    """The two halves of 4B's configuration, in transformers 5's terms."""
    config = json.loads(_PUBLISHED.read_text())
    text, vision = config["text_config"], config["vision_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    return text, vision


def label(model: ModelConfig) -> str:
    return f"fp8_{model.fp8.recipe}" if model.precision == "fp8" else model.precision


def not_on_a_cpu(scale: Scale) -> Variants:
    """On a dry run, of each FP8 recipe what would be switched on."""
    for recipe in RECIPES if scale.dry else ():
        yield f"fp8_{recipe}", partial(_would_be, ModelConfig("", "fp8", FP8Config(recipe)))


def _would_be(model: ModelConfig) -> dict[str, Any]:
    from prism_megatron.model.fp8 import megatron_settings

    return {"needs": "a GPU", "megatron": megatron_settings(model)}


def sft_config(checkpoint: Path, model: ModelConfig, lr: float) -> SFTConfig:
    config = tiny_sft()
    config.model = ModelConfig(str(checkpoint), model.precision, model.fp8)
    config.optimizer = OptimizerConfig(lr=lr, adam_beta2=0.95)
    config.max_tokens_per_microbatch = 1 << 15
    return config


def full_size(scale: Scale) -> Path:
    """A checkpoint directory without weights that could be used: 4B's configuration ``scale.layers`` deep."""
    directory = make_tiny_model(scale.folder / "full", seed=1)
    if not scale.dry:
        path = directory / "config.json"
        config, (text, vision) = json.loads(path.read_text()), published()
        config["text_config"] |= text | {"num_hidden_layers": scale.layers}
        config["vision_config"] |= vision
        path.write_text(json.dumps(config))
    return directory


def random_policy(config: SFTConfig) -> Trained:
    """As ``load_policy``, with weights drawn in place: 4B's would take minutes to write and to read."""
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.model.build import build_policy, read_sizes, wrap_for_training
    from prism_megatron.optim.optimizer import build_optimizer

    source = Path(config.model.hf_checkpoint)
    sizes = read_sizes(source)
    chunks = build_policy(config.model, config.parallel, sizes)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, _INIT_STD)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    wrapped = wrap_for_training(chunks, use_distributed_optimizer=False)
    optimizer = build_optimizer(config.optimizer, wrapped)
    return Trained("policy", wrapped, optimizer, config.optimizer, policy_table(sizes), sizes, source, {})


def rows_with_images(processor: ChatProcessor, scale: Scale, count: int) -> list[TrainingSequence]:
    """Rows of made-up text and an image of a size that photographs and screenshots have."""
    sizes = ((64, 64), (96, 64)) if scale.dry else ((448, 448), (640, 480), (1024, 768), (1280, 720))
    answer = 16 if scale.dry else 256
    return [_row(processor.input_spec, sizes[i % len(sizes)], answer, seed=i) for i in range(count)]


def _row(spec: InputSpec, size: tuple[int, int], answer: int, seed: int) -> TrainingSequence:
    unit = 16 * spec.merge_size
    width, height = (max(round(side / unit), 1) * spec.merge_size for side in size)
    draw = torch.Generator().manual_seed(seed)
    visual = Visual(torch.randn(width * height, spec.patch_dim, generator=draw), (1, height, width))
    shown = (spec.image_token_id,) * (width * height // spec.merge_size**2)
    prompt = EncodedPrompt((*range(_TEXT_TOKENS), *shown), (visual,))
    return TrainingSequence(prompt, tuple(torch.randint(0, 256, (answer,), generator=draw).tolist()))


def owners(rows: Sequence[Any]) -> list[str]:
    return [f"row {number}" for number in range(len(rows))]


def task_rows(processor: ChatProcessor, folder: Path, count: int) -> list[TrainingSequence]:
    """Rows of the built-in visual task."""
    from prism_megatron.data.dataset import read_sft
    from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
    from prism_megatron.stages.sft import demonstrations

    write_shapes_data(folder, ShapesConfig(sft_rows=count, alignment_rows=1, rlvr_rows=1, heldout_rows=1))
    return demonstrations(read_sft(folder / "sft.jsonl"), processor)


def not_on_this_gpu(model: ModelConfig) -> str | None:
    """Why this GPU has not got a precision, if it has not."""
    from prism_megatron.model.fp8 import check_hardware

    try:
        check_hardware(model)
    except ValueError as error:
        return str(error)
    return None
