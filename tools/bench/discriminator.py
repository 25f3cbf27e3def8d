"""Benchmark the discriminator's scoring: packed branches, and the paper's code's one sequence at a time.

    python -m tools.bench.discriminator --recipe tiny

A step has ``--samples`` responses and one demonstration per prompt, two branches each. Both ways start from encoded
rows and run the same network without gradients. They alternate, so that a busy machine slows both, and their scores
must agree. Prints one JSON line: medians, p90, tokens per second, memory, the ratio of the medians, sequence lengths.

The built-in images are enlarged to 192 x 288 pixels, 54 tokens, about as many as a response has; the paper's, up to 560
pixels a side, have up to 306. With ``--image-scale 1`` they have 6 tokens, and packing saves less.

One at a time encodes the image for every sequence and computes the last layer for all tokens, not only for those that
are read. The paper's code does more that is left out here (spec 4.3, 9.4): it decodes token by token to find the end of
the caption, computes every expert for every token, and scores a demonstration once for every response.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from prism_megatron.config import AlignConfig
from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from recipes import STAGE_RECIPES
from tools.bench import harness

if TYPE_CHECKING:
    from torch import Tensor

    from prism_megatron.data.pack import TrainingSequence
    from prism_megatron.types import Example

_AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}  # largest difference of the scores, relative to the largest score


@dataclass(frozen=True)
class Settings:
    """Measured step. ``sizes`` are of the dense model that is upcycled, as ``make_tiny_model`` takes them."""

    recipe: str
    samples: int  # responses per prompt
    prompts: int
    rounds: int  # measured, at least two
    precision: str = "fp32"
    sizes: Mapping[str, Mapping[str, Any]] | None = None
    image_scale: int = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="family of recipes whose alignment stage is used")
    parser.add_argument("--samples", type=int, default=16, help="responses per prompt")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--image-scale", type=int, default=3, help="factor that enlarges the images' sides")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each way, at least 2")
    harness.add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        print(f"error: --rounds must be at least 2 for a median and a p90, got {arguments.rounds}", file=sys.stderr)
        return 2
    recipe = f"{arguments.recipe}_align"
    if recipe not in STAGE_RECIPES:
        print(f"error: no recipe {recipe}; there are {', '.join(sorted(STAGE_RECIPES))}", file=sys.stderr)
        return 2
    settings = Settings(
        recipe, arguments.samples, arguments.prompts, arguments.rounds, image_scale=arguments.image_scale
    )
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, Path(folder))
    return harness.finish(result, arguments, ["ratio"])


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure sequences and tokens per second of both ways, after one round of warm-up.

    ``extra_peak_bytes`` are beyond the memory of model and rows.
    """
    from prism_megatron.parallel import groups
    from recipes.tiny_model import make_tiny_model

    make_tiny_model(folder / "base", seed=1, overrides=settings.sizes)
    rows = (settings.samples + 1) * settings.prompts
    write_shapes_data(folder / "data", ShapesConfig(sft_rows=1, alignment_rows=rows, rlvr_rows=1, heldout_rows=1))
    config = STAGE_RECIPES[settings.recipe]()
    assert isinstance(config, AlignConfig)
    config.model.hf_checkpoint = config.discriminator.hf_checkpoint = str(folder / "base")
    config.model.precision = settings.precision
    groups.initialize(config.parallel, seed=1)
    sides, sequences, image_token = _sides(config, folder / "data" / "alignment.parquet", settings)
    scores: dict[str, Tensor] = {}

    def score_once(name: str, _number: int) -> None:
        scores[name] = sides[name]()

    seconds = harness.interleaved({name: partial(score_once, name) for name in sides}, settings.rounds, warmup=1)
    peak = harness.peak_bytes()
    extra = {name: harness.extra_peak_bytes(side) for name, side in sides.items()}
    groups.shutdown()
    tokens = sum(map(len, sequences))
    difference = float((scores["packed"] - scores["one_at_a_time"]).abs().max() / scores["packed"].abs().max())
    if difference > _AGREEMENT[settings.precision]:
        raise RuntimeError(f"both ways must score alike, and differ by {difference:.2g} of the largest score")
    return {
        "benchmark": "discriminator",
        "config": asdict(settings),
        "ranks": 1,
        "sequences": len(sequences),
        "mean_tokens": _mean_tokens(sequences, image_token),
        **harness.provenance(),
        "scores_relative_difference": difference,
        "peak_bytes_of_both_ways": peak,
        **{
            name: {
                "seconds": harness.median_and_p90(values),
                "sequences_per_second": len(sequences) / statistics.median(values),
                "tokens_per_second": tokens / statistics.median(values),
                "extra_peak_bytes": extra[name],
            }
            for name, values in seconds.items()
        },
        "ratio": statistics.median(seconds["one_at_a_time"]) / statistics.median(seconds["packed"]),
    }


def _sides(
    config: AlignConfig, data: Path, settings: Settings
) -> tuple[dict[str, Callable[[], Tensor]], list[TrainingSequence], int]:
    """Return both ways of scoring one step's sequences, the sequences, and the image token."""
    import torch

    from prism_megatron.data.branches import branch_sequences
    from prism_megatron.data.dataset import read_alignment
    from prism_megatron.stages.batcher import Batcher
    from prism_megatron.stages.discriminator import score
    from prism_megatron.stages.setup import load_discriminator, load_processor

    processor = load_processor(config)
    rows = read_alignment(data)
    encoded = processor.encode_prompts([_enlarged(row, settings.image_scale) for row in rows[: settings.prompts]])
    sequences: list[TrainingSequence] = []
    for number, row in enumerate(rows):  # texts of other rows serve as responses
        assert row.teacher_caption is not None
        assert row.teacher_reasoning is not None
        prompt = encoded[number // (settings.samples + 1)]
        sequences += branch_sequences(processor, prompt, row.teacher_caption, row.teacher_reasoning)
    trained = load_discriminator(config, config.discriminator_optimizer)
    head = trained.chunks[-1].module.score_heads.weight
    with torch.no_grad():  # initial zeros would give every sequence the same score
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    batcher = Batcher.from_config(processor.input_spec, config)
    sample_ids = [str(number) for number in range(len(sequences))]

    def packed() -> Tensor:
        return score(trained, batcher.scoring(sequences), sample_ids)

    scorer, skips = trained.chunks[-1].module, trained.chunks[-1].module.may_skip

    def one_at_a_time() -> Tensor:
        scorer.may_skip = False
        scores = torch.cat([score(trained, batcher.scoring([sequence]), ["x"]) for sequence in sequences])
        scorer.may_skip = skips
        return scores

    return {"packed": packed, "one_at_a_time": one_at_a_time}, sequences, processor.input_spec.image_token_id


def _enlarged(row: Example, scale: int) -> Example:
    images = []
    for image in row.images:
        picture, out = Image.open(io.BytesIO(image)), io.BytesIO()
        picture.resize((scale * picture.width, scale * picture.height)).save(out, "PNG")
        images.append(out.getvalue())
    return replace(row, images=tuple(images))


def _mean_tokens(sequences: Sequence[TrainingSequence], image_token: int) -> dict[str, float]:
    """Return the mean number of image tokens, prompt tokens (images included) and response tokens."""
    prompts, responses = [s.prompt.token_ids for s in sequences], [s.response_ids for s in sequences]
    return {
        "image": statistics.mean(ids.count(image_token) for ids in prompts),
        "prompt": statistics.mean(map(len, prompts)),
        "response": statistics.mean(map(len, responses)),
    }


if __name__ == "__main__":
    sys.exit(main())
