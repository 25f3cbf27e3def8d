"""How fast a training step is, beside HF transformers with torch's AdamW on the very same rows, in one run.

    python tools/bench_train.py --recipe tiny --vs hf

Each step starts from encoded rows: laying them out (packed here, padded there), forward, backward, optimizer. Steps of
both sides alternate, so that a busy machine slows both; medians and their ratio are printed as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from prism_megatron.config import SFTConfig, apply_overrides
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from prism_megatron.types import InputSpec
from recipes import STAGE_RECIPES

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="family of recipes whose SFT stage is run")
    parser.add_argument("--vs", choices=["hf"], help="measure HF transformers on the same rows too")
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    recipe = f"{arguments.recipe}_sft"
    if recipe not in STAGE_RECIPES:
        print(f"error: no recipe {recipe}; there are {', '.join(sorted(STAGE_RECIPES))}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        result = measure(recipe, Path(folder), arguments.vs == "hf", arguments.steps, arguments.warmup)
    print(json.dumps(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(recipe: str, folder: Path, with_hf: bool, steps: int, warmup: int) -> dict[str, Any]:
    """Median seconds and tokens per second of each side."""
    from prism_megatron.parallel import groups
    from tools.make_tiny_model import make_tiny_model

    make_tiny_model(folder / "base", seed=1)
    overrides = [f"model.hf_checkpoint={folder}/base", f"data={folder}/data/sft.jsonl", f"run.dir={folder}/runs"]
    config = apply_overrides(STAGE_RECIPES[recipe](), overrides)
    assert isinstance(config, SFTConfig)
    rows = config.global_batch_size * 4
    write_shapes_data(folder / "data", ShapesConfig(sft_rows=rows, alignment_rows=1, rlvr_rows=1, heldout_rows=1))
    groups.initialize(config.parallel, seed=1)
    from prism_megatron.data.dataset import read_sft
    from prism_megatron.stages.setup import load_processor
    from prism_megatron.stages.sft import demonstrations

    processor = load_processor(config)
    sequences = demonstrations(read_sft(Path(config.data)), processor)
    size = config.global_batch_size
    batches = [sequences[start : start + size] for start in range(0, rows, size)]
    sides = {"ours": our_step(config, processor)}
    if with_hf:
        sides["hf"] = hf_step(config, processor.input_spec)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + steps):
        batch = batches[number % len(batches)]
        for name, step in sides.items():
            began = time.perf_counter()
            losses[name].append(step(batch))
            if number >= warmup:
                seconds[name].append((time.perf_counter() - began) / sum(map(len, batch)))
    groups.shutdown()
    result: dict[str, Any] = {"benchmark": "train", "recipe": recipe, "ranks": 1, "steps": steps, **provenance()}
    result["tokens_per_step"] = sum(map(len, sequences)) / len(batches)
    for name, values in seconds.items():
        median, p90 = statistics.median(values), statistics.quantiles(values, n=10)[-1]
        result[name] = {"tokens_per_second": 1 / median, "tokens_per_second_p90_slowest": 1 / p90}
        result[name]["first_loss"] = losses[name][0]
    if with_hf:
        result["ours_over_hf"] = statistics.median(seconds["hf"]) / statistics.median(seconds["ours"])
    return result


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


def provenance() -> dict[str, Any]:
    """Commit, versions and hardware a figure belongs to."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = {name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
    return {
        "commit": commit.stdout.strip() or None,
        "versions": versions,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main())
