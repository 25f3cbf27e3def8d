"""How fast a step's branches are scored, beside the reference's way: one sequence at a time, its image encoded anew.

    python -m tools.bench.discriminator --recipe tiny

A step's sequences are those of ``--samples`` responses and one demonstration to each prompt, two branches each. Both
ways start from encoded rows and run the same network without gradient, turn by turn, so that a busy machine slows both.
The sides' scores must agree; medians, p90, tokens a second, memory and the medians' ratio are printed as one JSON line,
and how long sequences are.

The built-in pictures are enlarged to 192 x 288 pixels, 54 tokens, about as many as a response has; the paper's of up to
560 pixels a side have up to 306. ``--image-scale 1`` leaves them at 6 tokens, where there is less to save.

The reference's way takes all tokens through the last layer, not only those that are read. It does more for each
sequence (spec 4.3, 9.4), which is left out here: it decodes token by token to find where the caption ends, computes
every expert for every token, and scores a demonstration once for every response.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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

_AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}  # of both sides' scores, relative to the largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="family of recipes whose alignment stage is meant")
    parser.add_argument("--samples", type=int, default=16, help="responses to a prompt")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--image-scale", type=int, default=3, help="enlarges images to so many times their side")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each side, at least 2")
    harness.add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        print(f"error: --rounds must be at least 2 for a median and a p90, got {arguments.rounds}", file=sys.stderr)
        return 2
    recipe = f"{arguments.recipe}_align"
    if recipe not in STAGE_RECIPES:
        print(f"error: no recipe {recipe}; there are {', '.join(sorted(STAGE_RECIPES))}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            recipe,
            Path(folder),
            arguments.samples,
            arguments.prompts,
            arguments.rounds,
            scale=arguments.image_scale,
        )
    return harness.finish(result, arguments, ["ratio"])


def measure(
    recipe: str,
    folder: Path,
    samples: int,
    prompts: int,
    rounds: int,
    precision: str = "fp32",
    sizes: Mapping[str, Mapping[str, Any]] | None = None,
    scale: int = 1,
) -> dict[str, Any]:
    """Sequences and tokens a second of each side, over ``rounds`` turns (at least two) after one to warm up.

    ``extra_peak_bytes`` are a side's beyond what model and rows take. ``sizes`` are those of the dense model that is
    upcycled, as ``make_tiny_model`` takes them; ``scale`` enlarges images.
    """
    from prism_megatron.parallel import groups
    from recipes.tiny_model import make_tiny_model

    make_tiny_model(folder / "base", seed=1, overrides=sizes)
    rows = (samples + 1) * prompts
    write_shapes_data(folder / "data", ShapesConfig(sft_rows=1, alignment_rows=rows, rlvr_rows=1, heldout_rows=1))
    config = STAGE_RECIPES[recipe]()
    assert isinstance(config, AlignConfig)
    config.model.hf_checkpoint = config.discriminator.hf_checkpoint = str(folder / "base")
    config.model.precision = precision
    groups.initialize(config.parallel, seed=1)
    sides, sequences, image_token = _sides(config, folder / "data" / "alignment.parquet", samples, prompts, scale)
    scores: dict[str, Tensor] = {}

    def turn(name: str, _number: int) -> None:
        scores[name] = sides[name]()

    seconds = harness.interleaved({name: partial(turn, name) for name in sides}, rounds, warmup=1)
    peak = harness.peak_bytes()
    extra = {name: harness.extra_peak_bytes(side) for name, side in sides.items()}
    groups.shutdown()
    tokens = sum(map(len, sequences))
    difference = float((scores["packed"] - scores["one_at_a_time"]).abs().max() / scores["packed"].abs().max())
    if difference > _AGREEMENT[precision]:
        raise RuntimeError(f"both ways must score alike, and differ by {difference:.2g} of the largest score")
    return {
        "benchmark": "discriminator",
        "config": {
            "recipe": recipe,
            "precision": precision,
            "sizes": sizes,
            "samples": samples,
            "prompts": prompts,
            "image_scale": scale,
            "rounds": rounds,
        },
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
    config: AlignConfig, data: Path, samples: int, prompts: int, scale: int
) -> tuple[dict[str, Callable[[], Tensor]], list[TrainingSequence], int]:
    """Both ways of scoring one step's sequences, these, and the token that stands for images in them."""
    import torch

    from prism_megatron.data.branches import branch_sequences
    from prism_megatron.data.dataset import read_alignment
    from prism_megatron.stages.batcher import Batcher
    from prism_megatron.stages.discriminator import score
    from prism_megatron.stages.setup import load_discriminator, load_processor

    processor = load_processor(config)
    rows = read_alignment(data)
    shown = [replace(row, images=tuple(_enlarged(image, scale) for image in row.images)) for row in rows[:prompts]]
    encoded = processor.encode_prompts(shown)
    sequences: list[TrainingSequence] = []
    for number, row in enumerate(rows):  # the texts of other rows stand for responses
        assert row.teacher_caption is not None
        assert row.teacher_reasoning is not None
        prompt = encoded[number // (samples + 1)]
        sequences += branch_sequences(processor, prompt, row.teacher_caption, row.teacher_reasoning)
    trained = load_discriminator(config, config.discriminator_optimizer)
    head = trained.chunks[-1].module.score_heads.weight
    with torch.no_grad():  # at zero, as it starts, every score is the same
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


def _enlarged(image: bytes, scale: int) -> bytes:
    picture = Image.open(io.BytesIO(image))
    out = io.BytesIO()
    picture.resize((scale * picture.width, scale * picture.height)).save(out, "PNG")
    return out.getvalue()


def _mean_tokens(sequences: Sequence[TrainingSequence], image_token: int) -> dict[str, float]:
    """Of a sequence: its image's tokens, its prompt's with these, its response's."""
    prompts, responses = [s.prompt.token_ids for s in sequences], [s.response_ids for s in sequences]
    return {
        "image": statistics.mean(ids.count(image_token) for ids in prompts),
        "prompt": statistics.mean(map(len, prompts)),
        "response": statistics.mean(map(len, responses)),
    }


if __name__ == "__main__":
    sys.exit(main())
