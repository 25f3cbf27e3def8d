"""What the training benchmark trains: a recipe's configuration, a random model of any size, and rows with images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_megatron.config import SFTConfig, apply_overrides
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from prism_megatron.model.build import HFSizes
from prism_megatron.types import EncodedPrompt, Example, InputSpec, Message, Visual
from recipes import STAGE_RECIPES, stage_recipe
from recipes.memory import PUBLISHED
from tools.make_tiny_model import MOE_CONFIG, PATCH, TEXT_CONFIG, VISION_CONFIG, VOCAB_SIZE, make_tiny_model

_SIZES = Path(__file__).parent / "sizes"
_MOCK_TEXT = 32  # tokens around an image that is made up


@dataclass(frozen=True)
class Settings:
    """What is measured. ``images`` is shapes, mock or a directory; ``resolutions`` are mock images' (width, height).

    ``size`` is tiny, tiny_moe, a published size, a name in tools/sizes, or a JSON file as ``tools/make_tiny_model.py``
    takes it.
    """

    recipe: str = "tiny_sft"
    size: str = "tiny"
    images: str = "shapes"
    resolutions: tuple[tuple[int, int], ...] = ((64, 64), (128, 96))
    response_tokens: int = 96  # of a mock row
    overrides: tuple[str, ...] = ()
    steps: int = 12
    warmup: int = 3
    vs_hf: bool = False


def read_config(settings: Settings, folder: Path) -> SFTConfig:
    """The recipe on a model and data in ``folder``. Raises ValueError for what is not an SFT recipe."""
    name = settings.recipe if settings.recipe in STAGE_RECIPES else f"{settings.recipe}_sft"
    paths = [f"model.hf_checkpoint={folder}/base", f"data={folder}/data/sft.jsonl", f"run.dir={folder}/runs"]
    config = apply_overrides(stage_recipe(name)(), [*paths, *settings.overrides])
    if not isinstance(config, SFTConfig):
        raise ValueError(f"recipe {name} is not of stage sft, whose step is measured; take tiny_sft or sft_qwen3_vl_*")
    return config


def make_model(settings: Settings, folder: Path, batches: int) -> SFTConfig:
    """Open the ranks' groups, and make model and rows for ``batches`` steps in rank 0's ``folder``.

    Raises ValueError for what cannot be run.
    """
    from prism_megatron.model.fp8 import check_hardware
    from prism_megatron.parallel import groups

    config, sizes = read_config(settings, folder), model_sizes(settings.size)
    groups.check_degrees(config.parallel, int(os.environ.get("WORLD_SIZE", "1")), sizes.degrees())
    check_hardware(config.model)
    groups.initialize(config.parallel, seed=1)
    shared = [str(folder)]
    dist.broadcast_object_list(shared, device=groups.device())
    if groups.is_main_rank() and not (folder / "base").is_dir():
        moe = sizes.num_experts is not None
        make_tiny_model(folder / "base", seed=1, moe=moe, overrides=model_overrides(settings.size))
        if settings.images == "shapes":
            count = config.global_batch_size * batches
            data = ShapesConfig(sft_rows=count, alignment_rows=1, rlvr_rows=1, heldout_rows=1)
            write_shapes_data(Path(config.data).parent, data)
    dist.barrier()
    return read_config(settings, Path(shared[0]))


def model_sizes(size: str) -> HFSizes:
    """What ``make_tiny_model`` will make of ``model_overrides(size)``."""
    return sizes_of(model_overrides(size))


def sizes_of(overrides: Mapping[str, dict[str, Any]]) -> HFSizes:
    """What ``make_tiny_model`` will make of both of these."""
    text = TEXT_CONFIG | {"vocab_size": VOCAB_SIZE, "rms_norm_eps": 1e-6} | overrides["text_config"]
    vision = VISION_CONFIG | {"in_channels": 3} | overrides["vision_config"] | {"out_hidden_size": text["hidden_size"]}
    return HFSizes(text, vision, text["tie_word_embeddings"])


def model_overrides(size: str) -> dict[str, dict[str, Any]]:
    """Sizes of the random model that are not the tiny one's. Raises ValueError for what is no size."""
    if size in ("tiny", "tiny_moe"):
        return {"text_config": dict(MOE_CONFIG) if size == "tiny_moe" else {}, "vision_config": {}}
    named = {path.stem: path for folder in (PUBLISHED, _SIZES) for path in folder.glob("*.json")}
    path = named.get(size, Path(size))
    if not path.is_file():
        known = ", ".join(("tiny", "tiny_moe", *sorted(named)))
        raise ValueError(f"--size {size} is neither one of {known}, nor a JSON file of sizes")
    found = json.loads(path.read_text())
    overrides = {part: dict(found.get(part, {})) for part in ("text_config", "vision_config")}
    text = overrides["text_config"]
    if "tie_word_embeddings" in found:
        text["tie_word_embeddings"] = found["tie_word_embeddings"]
    if "rope_scaling" in text:  # as released; transformers 5 has one name for both
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    for values in overrides.values():
        values.pop("model_type", None)
    return overrides


def training_sequences(settings: Settings, config: SFTConfig, processor: Any, count: int) -> list[TrainingSequence]:
    """``count`` encoded rows that show what the settings say."""
    from prism_megatron.data.dataset import read_sft
    from prism_megatron.stages.sft import demonstrations

    if settings.images == "mock":
        return [mock_row(processor.input_spec, settings, number) for number in range(count)]
    if settings.images == "shapes":
        return demonstrations(read_sft(Path(config.data)), processor)
    kinds = (".png", ".jpg", ".jpeg")
    folder = Path(settings.images)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds) if folder.is_dir() else []
    if not files:
        raise ValueError(f"--images {settings.images} is neither shapes nor mock nor a directory of {', '.join(kinds)}")
    chat = (Message("user", "<image>What is shown?"),)
    chosen = [files[number % len(files)] for number in range(count)]
    rows = [Example(str(p), chat, (p.read_bytes(),), str(p), response="Something. " * 20) for p in chosen]
    return demonstrations(rows, processor)


def resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """Raises ValueError for anything but WIDTHxHEIGHT, and commas between."""
    sizes = []
    for item in text.split(","):
        width, _, height = item.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise ValueError(f"--resolutions has {item!r}; give WIDTHxHEIGHT in pixels, for example 448x448,1024x768")
        sizes.append((int(width), int(height)))
    return tuple(sizes)


def mock_shape(settings: Settings, sizes: HFSizes, number: int) -> tuple[int, int]:
    """Tokens and patches of a made-up row."""
    height, width = _grid(settings, sizes.vision["spatial_merge_size"], number)
    shown = height * width // sizes.vision["spatial_merge_size"] ** 2
    return _MOCK_TEXT + shown + settings.response_tokens, height * width


def mock_row(spec: InputSpec, settings: Settings, number: int) -> TrainingSequence:
    """A made-up row with one image of random pixels, the same on every rank."""
    height, width = _grid(settings, spec.merge_size, number)
    generator = torch.Generator().manual_seed(number)
    visual = Visual(torch.randn(width * height, spec.patch_dim, generator=generator), (1, height, width))
    shown = (spec.image_token_id,) * (width * height // spec.merge_size**2)
    response = tuple(token % 128 for token in range(settings.response_tokens))
    return TrainingSequence(EncodedPrompt((*range(_MOCK_TEXT), *shown), (visual,)), response)


def _grid(settings: Settings, merge_size: int, number: int) -> tuple[int, int]:
    """Rows and columns of patches in a made-up image: its resolution, rounded to what the model can merge."""
    width, height = settings.resolutions[number % len(settings.resolutions)]
    rows, columns = (max(round(side / (PATCH * merge_size)), 1) * merge_size for side in (height, width))
    return rows, columns
