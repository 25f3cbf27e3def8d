"""Inputs of the training benchmark: a recipe's configuration, random models of any size, and rows with images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_megatron.config import AlignConfig, RLVRConfig, SFTConfig, WarmupConfig, apply_overrides
from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes
from prism_megatron.types import EncodedPrompt, Example, InputSpec, Message, Visual
from recipes import STAGE_RECIPES, stage_recipe
from recipes.estimate.memory import PUBLISHED
from recipes.tiny_model import MOE_CONFIG, PATCH, TEXT_CONFIG, VISION_CONFIG, VOCAB_SIZE, make_tiny_model

if TYPE_CHECKING:
    from prism_megatron.data.pack import TrainingSequence

BATCHES = 4  # distinct batches, used in rotation
_SIZES = Path(__file__).parent / "sizes"
_MOCK_TEXT = 32  # text tokens around a mock image
TrainingConfig = SFTConfig | WarmupConfig | AlignConfig | RLVRConfig


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    ``images`` is shapes, mock or a directory; ``resolutions`` are the (width, height) of mock images. ``size`` is tiny,
    tiny_moe, a published size, a name in tools/bench/sizes, or a JSON file as ``recipes.tiny_model`` takes it;
    ``discriminator_size`` too, None for a discriminator that is upcycled from the policy.
    """

    recipe: str = "tiny_sft"
    size: str = "tiny"
    images: str = "shapes"
    resolutions: tuple[tuple[int, int], ...] = ((64, 64), (128, 96))
    response_tokens: int = 96  # of a mock row or a synthetic response
    overrides: tuple[str, ...] = ()
    steps: int = 12
    warmup: int = 3
    vs_hf: bool = False
    discriminator_size: str | None = None


def read_config(settings: Settings, folder: Path) -> TrainingConfig:
    """Return the recipe's configuration on models and data in ``folder``. Raises UserError if it cannot run."""
    name = settings.recipe if settings.recipe in STAGE_RECIPES else f"{settings.recipe}_sft"
    config = stage_recipe(name)()
    if not isinstance(config, TrainingConfig):
        raise UserError(f"recipe {name} is of stage {config.stage}, which trains nothing; take another recipe")
    if settings.vs_hf and not isinstance(config, SFTConfig):
        raise UserError(
            f"--vs hf is for SFT: HF transformers has no training step of stage {config.stage}, of which recipe {name} "
            "is; leave it out"
        )
    data = "sft.jsonl" if isinstance(config, SFTConfig) else "alignment.parquet"
    paths = [f"model.hf_checkpoint={folder}/base", f"data={folder}/data/{data}", f"run.dir={folder}/runs"]
    if isinstance(config, WarmupConfig | AlignConfig):
        made_from = "base" if settings.discriminator_size is None else "discriminator"
        paths.append(f"discriminator.hf_checkpoint={folder}/{made_from}")
    config = apply_overrides(config, [*paths, *settings.overrides])
    if isinstance(config, AlignConfig) and config.replay.prompts and settings.images == "mock":
        raise UserError(
            f"replay.prompts ({config.replay.prompts}) encodes past images again, which --images mock does not have; "
            "use shapes or a directory, or replay.prompts=0"
        )
    return config


def read_sft_config(settings: Settings, folder: Path) -> SFTConfig:
    """Return an SFT recipe's configuration. Raises UserError for a recipe of another stage."""
    config = read_config(settings, folder)
    if not isinstance(config, SFTConfig):
        raise UserError(f"recipe {settings.recipe} is of stage {config.stage}; take tiny_sft or sft_qwen3_vl_*")
    return config


def rows_per_step(config: TrainingConfig) -> int:
    return config.global_batch_size if isinstance(config, SFTConfig | WarmupConfig) else config.prompts_per_iteration


def make_model(settings: Settings, folder: Path, batches: int) -> TrainingConfig:
    """Initialize the process groups, and make models and rows for ``batches`` steps in rank 0's ``folder``.

    Raises UserError for settings that cannot run.
    """
    import torch.distributed as dist

    from prism_megatron.model.fp8 import check_hardware
    from prism_megatron.parallel import groups
    from prism_megatron.parallel.degrees import check_degrees

    config = read_config(settings, folder)
    models = _models(settings, config)
    experts = config.discriminator.num_experts if isinstance(config, WarmupConfig | AlignConfig) else None
    for size in models.values():
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        check_degrees(config.parallel, world_size, model_sizes(size).degrees(experts))
    check_hardware(config.model)
    groups.initialize(config.parallel, seed=1)
    shared = [str(folder)]
    dist.broadcast_object_list(shared, device=groups.device())
    if groups.is_main_rank() and not (folder / "base").is_dir():
        for name, size in models.items():
            moe = model_sizes(size).num_experts is not None
            make_tiny_model(folder / name, seed=1, moe=moe, overrides=model_overrides(size))
        if settings.images == "shapes":
            count = rows_per_step(config) * batches
            sft, others = (count, 1) if isinstance(config, SFTConfig) else (1, count)
            data = ShapesConfig(sft_rows=sft, alignment_rows=others, rlvr_rows=1, heldout_rows=1)
            write_shapes_data(Path(config.data).parent, data)
    dist.barrier()
    return read_config(settings, Path(shared[0]))


def _models(settings: Settings, config: TrainingConfig) -> dict[str, str]:
    """Return the size of each model to make, by its folder."""
    size = settings.discriminator_size
    if not isinstance(config, WarmupConfig | AlignConfig):
        if size is not None:
            raise UserError(f"--discriminator-size is for stages that have one; {config.stage} has none, leave it out")
        return {"base": settings.size}
    dense = size or settings.size
    if (experts := model_sizes(dense).num_experts) is not None:
        raise UserError(
            f"{dense} has {experts} experts, and the discriminator is made from a model without; give the size of one "
            "as --discriminator-size"
        )
    return {"base": settings.size} | ({"discriminator": size} if size else {})


def model_sizes(size: str) -> HFSizes:
    """Return the sizes of the model that ``make_tiny_model`` makes of ``model_overrides(size)``."""
    return sizes_of(model_overrides(size))


def sizes_of(overrides: Mapping[str, dict[str, Any]]) -> HFSizes:
    """Return the sizes of the model that ``make_tiny_model`` makes of ``overrides``."""
    text = TEXT_CONFIG | {"vocab_size": VOCAB_SIZE, "rms_norm_eps": 1e-6} | overrides["text_config"]
    vision = VISION_CONFIG | {"in_channels": 3} | overrides["vision_config"] | {"out_hidden_size": text["hidden_size"]}
    return HFSizes(text, vision, text["tie_word_embeddings"])


def model_overrides(size: str) -> dict[str, dict[str, Any]]:
    """Return the sizes that differ from the tiny model's. Raises UserError for an unknown size."""
    if size in ("tiny", "tiny_moe"):
        return {"text_config": dict(MOE_CONFIG) if size == "tiny_moe" else {}, "vision_config": {}}
    named = {path.stem: path for folder in (PUBLISHED, _SIZES) for path in folder.glob("*.json")}
    path = named.get(size, Path(size))
    if not path.is_file():
        known = ", ".join(("tiny", "tiny_moe", *sorted(named)))
        raise UserError(f"--size {size} is neither one of {known}, nor a JSON file of sizes")
    found = json.loads(path.read_text())
    overrides = {part: dict(found.get(part, {})) for part in ("text_config", "vision_config")}
    text = overrides["text_config"]
    if "tie_word_embeddings" in found:
        text["tie_word_embeddings"] = found["tie_word_embeddings"]
    if "rope_scaling" in text:  # of released models; transformers 5 joins both keys
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    for values in overrides.values():
        values.pop("model_type", None)
    return overrides


def training_sequences(settings: Settings, config: SFTConfig, processor: Any, count: int) -> list[TrainingSequence]:
    """Return ``count`` encoded demonstrations with the images of the settings. Raises UserError if there are none."""
    from prism_megatron.data.dataset import read_sft
    from prism_megatron.stages.sft import demonstrations

    if settings.images == "mock":
        return [mock_row(processor.input_spec, settings, number) for number in range(count)]
    if settings.images == "shapes":
        return demonstrations(read_sft(Path(config.data)), processor)
    return demonstrations([replace(row, response="Something. " * 20) for row in image_rows(settings, count)], processor)


def image_rows(settings: Settings, count: int) -> list[Example]:
    """Return a question about each of ``count`` images of a folder. Raises UserError if it has none."""
    kinds = (".png", ".jpg", ".jpeg")
    folder = Path(settings.images)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds) if folder.is_dir() else []
    if not files:
        raise UserError(f"--images {settings.images} is neither shapes nor mock nor a directory of {', '.join(kinds)}")
    chat = (Message("user", "<image>What is shown?"),)
    chosen = [files[number % len(files)] for number in range(count)]
    return [Example(f"{number} {p}", chat, (p.read_bytes(),), str(p)) for number, p in enumerate(chosen)]


def mock_shape(settings: Settings, sizes: HFSizes, number: int) -> tuple[int, int]:
    """Return the number of tokens and patches of a mock row."""
    height, width = _grid(settings, sizes.vision["spatial_merge_size"], number)
    image_tokens = height * width // sizes.vision["spatial_merge_size"] ** 2
    return _MOCK_TEXT + image_tokens + settings.response_tokens, height * width


def mock_row(spec: InputSpec, settings: Settings, number: int) -> TrainingSequence:
    """Return a mock row with one image of random pixels, the same on every rank."""
    import torch

    from prism_megatron.data.pack import TrainingSequence

    height, width = _grid(settings, spec.merge_size, number)
    generator = torch.Generator().manual_seed(number)
    visual = Visual(torch.randn(width * height, spec.patch_dim, generator=generator), (1, height, width))
    image = (spec.image_token_id,) * (width * height // spec.merge_size**2)
    response = tuple(token % 128 for token in range(settings.response_tokens))
    return TrainingSequence(EncodedPrompt((*range(_MOCK_TEXT), *image), (visual,)), response)


def _grid(settings: Settings, merge_size: int, number: int) -> tuple[int, int]:
    """Return rows and columns of patches of a mock image, rounded to a multiple that the model can merge."""
    width, height = settings.resolutions[number % len(settings.resolutions)]
    rows, columns = (max(round(side / (PATCH * merge_size)), 1) * merge_size for side in (height, width))
    return rows, columns
