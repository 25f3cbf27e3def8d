"""Models, rows and precisions of ``tools/gpu_check``."""

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
_SHOWN = Settings(images="mock", resolutions=((448, 448), (640, 480), (1024, 768), (1280, 720)), response_tokens=256)
_SHOWN_DRY = replace(_SHOWN, resolutions=((64, 64), (96, 64)), response_tokens=16)
_INIT_STD = 0.02
_TAKEN = 0.9  # of the GPU's memory: the estimate has never been measured on one


@dataclass(frozen=True)
class Scale:
    """How large everything is. ``layers`` is the depth of the decoder whose speed is measured, 0 what fits."""

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
        sizes = model_overrides("4b")
        sizes["text_config"] |= {"num_hidden_layers": layers, "vocab_size": 8192}
        sizes["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0, 1]}
        return sizes

    def rivals(self) -> list[ModelConfig]:
        """What is compared with ``precision``: every FP8 recipe this GPU has, BF16 on a dry run."""
        if self.dry:
            return [ModelConfig("", "bf16")]
        return [ModelConfig("", "fp8", FP8Config(recipe)) for recipe in RECIPES]


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
    config.model = replace(model, hf_checkpoint=str(checkpoint))
    config.optimizer = OptimizerConfig(lr=lr, adam_beta2=0.95)
    config.max_tokens_per_microbatch = 1 << 15
    return config


def whole_model() -> HFSizes:
    """4B's sizes."""
    with tempfile.TemporaryDirectory() as folder:
        return published_sizes("4b", Path(folder))


def step_bytes(layers: int, model: ModelConfig) -> float:
    """What a timed step of 4B, ``layers`` deep, holds at its fullest, by ``recipes/estimate/memory.py``.

    36 layers, GiB: 8.3 weights (15.0 with FP8's copies), 16.5 gradients, 49.6 optimizer, 19.6 activations where layers
    are recomputed (54 where they are not), 3.7 reserved: 98 in BF16, 105 in FP8, of an H200's 139. HF's float32
    weights and optimizer (66), their rounded copies (8), all logits at once (19) and its activations (7) are as much.
    """
    whole = whole_model()
    sizes = replace(whole, text=whole.text | {"num_hidden_layers": layers})
    config = sft_config(Path(), model, 0.0)
    config.eval.num_questions = 0  # no engine
    shapes = [mock_shape(_SHOWN, sizes, number) for number in range(ROWS)]
    tokens, patches = (sum(column) for column in zip(*shapes, strict=True))
    return estimate(config, 1, sizes, sizes, Load(tokens, patches, ROWS * _SHOWN.response_tokens, 1)).total


def fitting_layers(memory: float) -> int:
    """The most decoder layers of 4B whose step, in whichever precision, fits a GPU of ``memory`` bytes."""
    fp8 = ModelConfig("", "fp8", FP8Config(RECIPES[0]), recompute=True)
    whole = whole_model()
    levels = len(whole.vision["deepstack_visual_indexes"])  # of features, each added after a layer of its own
    for layers in range(whole.text["num_hidden_layers"], levels - 1, -1):
        if step_bytes(layers, fp8) <= _TAKEN * memory:
            return layers
    raise UserError(
        f"a GPU of {memory / 2**30:.0f} GiB is too small to train a few layers of 4B; take one of 48 or more"
    )


def not_whole(layers: int) -> str | None:
    """What to tell of a model of fewer layers than 4B has."""
    whole = whole_model().text["num_hidden_layers"]
    return f"{layers} of 4B's {whole} decoder layers, not the whole model" if layers < whole else None


def full_size(scale: Scale) -> Path:
    """A checkpoint directory without weights that could be used: 4B's configuration ``scale.layers`` deep."""
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
    """As ``load_policy``, with weights drawn in place: 4B's would take minutes to write and to read."""
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
    """Rows of made-up text and an image of a size that photographs and screenshots have."""
    shown = _SHOWN_DRY if scale.dry else _SHOWN
    return [mock_row(processor.input_spec, shown, number) for number in range(count)]


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
