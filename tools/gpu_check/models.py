"""Models, rows and precisions of the GPU check."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prism_megatron.config import FP8Config, ModelConfig, OptimizerConfig, SFTConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes
from prism_megatron.stages.setup import TrainableModel
from recipes.estimate.activations import Load
from recipes.estimate.memory import estimate, published_sizes
from recipes.tiny import tiny_sft
from recipes.tiny_model import make_tiny_model
from tools.bench.inputs import Settings, mock_row, mock_shape, model_overrides

Variants = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
ROWS = 8  # of a timed step
_IMAGES = Settings(images="mock", resolutions=((448, 448), (640, 480), (1024, 768), (1280, 720)), response_tokens=256)
_TINY_IMAGES = replace(_IMAGES, resolutions=((64, 64), (96, 64)), response_tokens=16)
_INIT_STD = 0.02
_TAKEN = 0.9  # fraction of the GPU's memory; the estimate was never measured on a GPU


@dataclass(frozen=True)
class Scale:
    """Sizes of the check. ``layers`` is the decoder depth of the timed parts, 0 for as many as fit."""

    dry: bool
    layers: int
    folder: Path

    @property
    def precision(self) -> str:
        """Return the baseline precision: BF16 for FP8; in a dry run float32 for BF16."""
        return "fp32" if self.dry else "bf16"

    def shallow(self, layers: int) -> dict[str, dict[str, Any]]:
        """Return 4B's widths with few layers and a small vocabulary, as ``make_tiny_model`` takes them."""
        if self.dry:
            return {"text_config": {"num_hidden_layers": layers}}
        sizes = model_overrides("4b")
        sizes["text_config"] |= {"num_hidden_layers": layers, "vocab_size": 8192}
        sizes["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0, 1]}
        return sizes

    def alternatives(self) -> list[ModelConfig]:
        """Return the precisions to compare with ``precision``: the FP8 recipes, or BF16 in a dry run."""
        if self.dry:
            return [ModelConfig("", "bf16")]
        return [ModelConfig("", "fp8", FP8Config(recipe)) for recipe in RECIPES]


def label(model: ModelConfig) -> str:
    return f"fp8_{model.fp8.recipe}" if model.precision == "fp8" else model.precision


def fp8_settings(scale: Scale) -> Variants:
    """Yield, in a dry run, Megatron's settings of each FP8 recipe."""
    for recipe in RECIPES if scale.dry else ():
        yield f"fp8_{recipe}", partial(_settings, ModelConfig("", "fp8", FP8Config(recipe)))


def _settings(model: ModelConfig) -> dict[str, Any]:
    from prism_megatron.model.fp8 import megatron_settings

    return {"needs": "a GPU", "megatron": megatron_settings(model)}


def sft_config(checkpoint: Path, model: ModelConfig, lr: float) -> SFTConfig:
    config = tiny_sft()
    config.model = replace(model, hf_checkpoint=str(checkpoint))
    config.optimizer = OptimizerConfig(lr=lr, adam_beta2=0.95)
    config.max_tokens_per_microbatch = 1 << 15
    return config


def full_model() -> HFSizes:
    """Return the sizes of 4B."""
    with tempfile.TemporaryDirectory() as folder:
        return published_sizes("4b", Path(folder))


def step_bytes(layers: int, model: ModelConfig) -> float:
    """Estimate the peak memory of a timed step of 4B with ``layers`` decoder layers.

    With 36 layers, in GiB: 8.3 weights (15.0 with FP8 copies), 16.5 gradients, 49.6 optimizer, 19.6 activations with
    recomputation (54 without), 3.7 reserved; in total 98 in BF16 and 105 in FP8, of an H200's 139. HF needs as much:
    float32 weights and optimizer (66), their BF16 copies (8), all logits at once (19) and activations (7).
    """
    full = full_model()
    sizes = replace(full, text=full.text | {"num_hidden_layers": layers})
    config = sft_config(Path(), model, 0.0)
    config.eval.num_questions = None  # no engine
    shapes = [mock_shape(_IMAGES, sizes, number) for number in range(ROWS)]
    tokens, patches = (sum(column) for column in zip(*shapes, strict=True))
    return estimate(config, 1, sizes, sizes, Load(tokens, patches, ROWS * _IMAGES.response_tokens, 1)).total


def fitting_layers(memory: float) -> int:
    """Return the number of decoder layers of 4B whose step fits a GPU of ``memory`` bytes in every precision."""
    fp8 = ModelConfig("", "fp8", FP8Config(RECIPES[0]), recompute=True)
    full = full_model()
    levels = len(full.vision["deepstack_visual_indexes"])  # of features, each added after its own layer
    for layers in range(full.text["num_hidden_layers"], levels - 1, -1):
        if step_bytes(layers, fp8) <= _TAKEN * memory:
            return layers
    raise UserError(
        f"a GPU of {memory / 2**30:.0f} GiB is too small to train a few layers of 4B; use one of 48 or more"
    )


def note_on_depth(layers: int) -> str | None:
    """Return a note if the model has fewer layers than 4B."""
    full = full_model().text["num_hidden_layers"]
    return f"{layers} of 4B's {full} decoder layers, not the full model" if layers < full else None


def full_size(scale: Scale) -> Path:
    """Write a checkpoint directory with 4B's configuration, ``scale.layers`` deep, and no usable weights."""
    directory = make_tiny_model(scale.folder / "full", seed=1)
    if not scale.dry:
        path = directory / "config.json"
        config, sizes = json.loads(path.read_text()), model_overrides("4b")
        layers = scale.layers or fitting_layers(torch.cuda.get_device_properties(0).total_memory)
        config["text_config"] |= sizes["text_config"] | {"num_hidden_layers": layers}
        config["vision_config"] |= sizes["vision_config"]
        path.write_text(json.dumps(config))
    return directory


def random_policy(config: SFTConfig) -> TrainableModel:
    """Build a policy with random weights in place, since writing and reading 4B's would take minutes."""
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.model.build import build_policy, wrap_for_training
    from prism_megatron.model.sizes import read_sizes
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
    return TrainableModel("policy", wrapped, optimizer, config.optimizer, policy_table(sizes), sizes, source, {})


def rows_with_images(processor: ChatProcessor, scale: Scale, count: int) -> list[TrainingSequence]:
    """Return mock rows with an image of the size of a photograph or screenshot."""
    settings = _TINY_IMAGES if scale.dry else _IMAGES
    return [mock_row(processor.input_spec, settings, number) for number in range(count)]


def sample_ids(rows: Sequence[Any]) -> list[str]:
    return [f"row {number}" for number in range(len(rows))]


def task_rows(processor: ChatProcessor, folder: Path, count: int) -> list[TrainingSequence]:
    """Return encoded demonstrations of the built-in visual task."""
    from prism_megatron.data.dataset import read_sft
    from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
    from prism_megatron.stages.sft import demonstrations

    write_shapes_data(folder, ShapesConfig(sft_rows=count, alignment_rows=1, rlvr_rows=1, heldout_rows=1))
    return demonstrations(read_sft(folder / "sft.jsonl"), processor)


def unsupported(model: ModelConfig) -> str | None:
    """Return why this GPU does not support a precision, None if it does."""
    from prism_megatron.model.fp8 import check_hardware

    try:
        check_hardware(model)
    except UserError as error:
        return str(error)
    return None
