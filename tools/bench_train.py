"""How fast a training step is, beside HF transformers with torch's AdamW on the very same rows, in one run.

    python tools/bench_train.py --recipe tiny --vs hf [--images mock --resolutions 64x64,128x96] [--compare OLD.json]

Each step starts from encoded rows: laying them out (packed here, padded there), forward, backward, optimizer. Steps of
both sides alternate, so that a busy machine slows both; medians and their ratio are printed as one JSON line. Weights
are the tiny model's, one rank trains. ``--images`` says what the rows show: ``shapes`` the built-in task, ``mock``
random pixels of the given sizes in turn, or a directory of PNG and JPEG files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from prism_megatron.config import SFTConfig, apply_overrides
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from prism_megatron.observe.flops import peak_flops, training_flops
from prism_megatron.types import EncodedPrompt, Example, InputSpec, Message, Visual
from recipes import STAGE_RECIPES
from tools import bench

_MOCK_TEXT, _MOCK_RESPONSE = 32, 96  # tokens around an image that is made up, and of the answer
_BATCHES = 4  # distinct ones, taken in turn


@dataclass(frozen=True)
class Settings:
    """What is measured. ``images`` is shapes, mock or a directory; ``resolutions`` are mock images' (width, height)."""

    recipe: str
    images: str
    resolutions: tuple[tuple[int, int], ...]
    overrides: tuple[str, ...]
    steps: int
    warmup: int
    vs_hf: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="family of recipes whose SFT stage is run")
    parser.add_argument("--images", default="shapes", help="shapes, mock, or a directory of images")
    parser.add_argument("--resolutions", default="64x64,128x96", help="of mock images, WIDTHxHEIGHT, taken in turn")
    parser.add_argument("--vs", choices=["hf"], help="measure HF transformers on the same rows too")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, at least 2")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    parser.add_argument("--compare", type=Path, help="JSON of an earlier run; exit status 1 where this one is slower")
    parser.add_argument("--tolerance", type=float, default=0.1, help="how much slower is still as fast")
    parser.add_argument("overrides", nargs="*", help="of the recipe, for example global_batch_size=8")
    arguments = parser.parse_args()
    try:
        return run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 2:
        raise ValueError(f"--steps must be at least 2 for a median and a p90, got {arguments.steps}")
    baseline = bench.read_baseline(arguments.compare) if arguments.compare else None
    settings = Settings(
        f"{arguments.recipe}_sft",
        arguments.images,
        _sizes(arguments.resolutions),
        tuple(arguments.overrides),
        arguments.steps,
        arguments.warmup,
        arguments.vs == "hf",
    )
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, Path(folder))
    bench.write(result, arguments.out)
    if baseline is None:
        return 0
    worse = bench.regressions(result, baseline, ["ours.tokens_per_second", "ours_over_hf"], arguments.tolerance)
    for line in worse:
        print(line, file=sys.stderr)
    return int(bool(worse))


@dataclass(frozen=True)
class Prepared:
    """Each side's training step, and the batches it takes. Megatron's groups are open: shut them down at the end."""

    config: SFTConfig
    batches: list[list[TrainingSequence]]
    sides: dict[str, Callable[[Sequence[TrainingSequence]], float]]


def prepare(settings: Settings, folder: Path) -> Prepared:
    """Make model and data in ``folder`` and build both sides. Raises ValueError for settings that cannot be run."""
    from prism_megatron.model.fp8 import check_hardware
    from prism_megatron.parallel import groups
    from tools.make_tiny_model import make_tiny_model

    if settings.recipe not in STAGE_RECIPES:
        raise ValueError(f"no recipe {settings.recipe}; there are {', '.join(sorted(STAGE_RECIPES))}")
    paths = [f"model.hf_checkpoint={folder}/base", f"data={folder}/data/sft.jsonl", f"run.dir={folder}/runs"]
    config = apply_overrides(STAGE_RECIPES[settings.recipe](), [*paths, *settings.overrides])
    assert isinstance(config, SFTConfig)
    check_hardware(config.model)
    make_tiny_model(folder / "base", seed=1)
    groups.initialize(config.parallel, seed=1)
    from prism_megatron.stages.setup import load_processor

    processor, size = load_processor(config), config.global_batch_size
    sequences = training_sequences(settings, config, processor, size * _BATCHES)
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    sides = {"ours": our_step(config, processor)}
    if settings.vs_hf:
        sides["hf"] = hf_step(config, processor.input_spec)
    return Prepared(config, batches, sides)


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds, tokens and operations a second of each side."""
    from prism_megatron.parallel import groups

    prepared = prepare(settings, folder)
    config, batches, sides = prepared.config, prepared.batches, prepared.sides
    losses: dict[str, float] = {}

    def step(name: str) -> Callable[[int], None]:
        def run_one(number: int) -> None:
            loss = sides[name](batches[number % len(batches)])
            losses.setdefault(name, loss)

        return run_one

    seconds = bench.interleaved({name: step(name) for name in sides}, settings.steps, settings.warmup)
    groups.shutdown()
    from prism_megatron.model.build import read_sizes
    from prism_megatron.stages.microbatch import workload

    sizes = read_sizes(Path(config.model.hf_checkpoint))
    flops = [training_flops(sizes.text, sizes.vision, workload(batch), config.model.freeze).model for batch in batches]
    tokens = [sum(map(len, batch)) for batch in batches]
    measured = [number % len(batches) for number in range(settings.warmup, settings.warmup + settings.steps)]
    where = bench.provenance()
    result: dict[str, Any] = {"benchmark": "train", "config": asdict(settings), "ranks": 1, **where}
    result["config"]["resolutions"] = [list(size) for size in settings.resolutions]
    result["config"]["overrides"] = list(settings.overrides)
    result["tokens_per_step"] = statistics.mean(tokens)
    result["peak_bytes_of_all_sides"] = bench.peak_bytes()
    peak = peak_flops(where["hardware"])
    for name, values in seconds.items():
        per_token = bench.median_and_p90([s / tokens[i] for s, i in zip(values, measured, strict=True)])
        rate = 1 / statistics.median([s / flops[i] for s, i in zip(values, measured, strict=True)])
        result[name] = {
            "tokens_per_second": 1 / per_token["median"],
            "tokens_per_second_p90_slowest": 1 / per_token["p90"],
            "step_seconds": bench.median_and_p90(values),
            "tflops": rate / 1e12,
            "mfu": rate / peak if peak else None,
            "first_loss": losses[name],
        }
    if settings.vs_hf:
        result["ours_over_hf"] = result["ours"]["tokens_per_second"] / result["hf"]["tokens_per_second"]
    return result


def training_sequences(settings: Settings, config: SFTConfig, processor: Any, count: int) -> list[TrainingSequence]:
    """``count`` encoded rows that show what the settings say."""
    from prism_megatron.data.dataset import read_sft
    from prism_megatron.stages.sft import demonstrations

    if settings.images == "mock":
        return [_mock(processor.input_spec, settings.resolutions[i % len(settings.resolutions)]) for i in range(count)]
    if settings.images == "shapes":
        data = ShapesConfig(sft_rows=count, alignment_rows=1, rlvr_rows=1, heldout_rows=1)
        write_shapes_data(Path(config.data).parent, data)
        return demonstrations(read_sft(Path(config.data)), processor)
    kinds = (".png", ".jpg", ".jpeg")
    folder = Path(settings.images)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds) if folder.is_dir() else []
    if not files:
        raise ValueError(f"--images {settings.images} is neither shapes nor mock nor a directory of {', '.join(kinds)}")
    chat = (Message("user", "<image>What is shown?"),)
    chosen = [files[i % len(files)] for i in range(count)]
    rows = [Example(str(p), chat, (p.read_bytes(),), str(p), response="Something. " * 20) for p in chosen]
    return demonstrations(rows, processor)


def _mock(spec: InputSpec, resolution: tuple[int, int]) -> TrainingSequence:
    """A made-up row with one image of random pixels."""
    unit = 16 * spec.merge_size
    width, height = (max(round(side / unit), 1) * spec.merge_size for side in resolution)
    visual = Visual(torch.randn(width * height, spec.patch_dim), (1, height, width))
    shown = (spec.image_token_id,) * (width * height // spec.merge_size**2)
    return TrainingSequence(EncodedPrompt((*range(_MOCK_TEXT), *shown), (visual,)), tuple(range(_MOCK_RESPONSE)))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for item in text.split(","):
        width, _, height = item.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise ValueError(f"--resolutions has {item!r}; give WIDTHxHEIGHT in pixels, for example 448x448,1024x768")
        sizes.append((int(width), int(height)))
    return tuple(sizes)


def our_step(config: SFTConfig, processor: Any) -> Callable[[Sequence[TrainingSequence]], float]:
    from prism_megatron.observe import metrics as names
    from prism_megatron.stages.policy import sft_step
    from prism_megatron.stages.setup import load_policy

    policy = load_policy(config)

    def step(batch: Sequence[TrainingSequence]) -> float:
        owners = [f"row {number}" for number in range(len(batch))]
        loss = sft_step(policy, batch, owners, processor, config, config.optimizer.lr)[names.LOSS]
        assert loss is not None
        return loss

    return step


def hf_step(config: SFTConfig, spec: InputSpec) -> Callable[[Sequence[TrainingSequence]], float]:
    """HF's model on the padded batch, its own loss, gradient clipping and torch's AdamW, with the recipe's numbers."""
    from transformers import AutoModelForImageTextToText

    hf = AutoModelForImageTextToText.from_pretrained(config.model.hf_checkpoint, dtype=torch.float32)
    hf.train()
    wanted = config.optimizer
    adam = torch.optim.AdamW(
        hf.parameters(),
        lr=wanted.lr,
        betas=(wanted.adam_beta1, wanted.adam_beta2),
        eps=wanted.adam_eps,
        weight_decay=wanted.weight_decay,
    )

    def step(batch: Sequence[TrainingSequence]) -> float:
        adam.zero_grad()
        loss: Tensor = hf(**padded(batch, spec)).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(hf.parameters(), wanted.clip_grad)
        adam.step()
        return float(loss.detach())

    return step


def padded(batch: Sequence[TrainingSequence], spec: InputSpec) -> dict[str, Tensor]:
    """The batch as HF's trainer would collate it: padded on the right, prompts masked in the labels."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sequence in enumerate(batch):
        tokens = torch.tensor(sequence.prompt.token_ids + sequence.response_ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, len(sequence.prompt.token_ids) : len(tokens)] = tokens[len(sequence.prompt.token_ids) :]
    visuals = [visual for sequence in batch for visual in sequence.prompt.visuals]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "mm_token_type_ids": (ids == spec.image_token_id).int(),
        "pixel_values": torch.cat([visual.patches for visual in visuals]),
        "image_grid_thw": torch.tensor([visual.grid for visual in visuals]),
    }


if __name__ == "__main__":
    sys.exit(main())
