"""Runs under torchrun: weights of every training layout in a vLLM engine that lives on, against HF on the same.

Arguments: the engine's tensor-parallel size, where to write, then kind=checkpoint=layouts for each model, a mixture of
experts first: vLLM makes all its groups only then.
"""

from __future__ import annotations

import io
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.config import ModelConfig, ParallelConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.shapes import ShapesConfig, sample_scenes
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_ranks
from prism_megatron.types import EncodedPrompt, Example, Message, Rollout, RolloutRequest

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2-uneven": ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=2),
    "pp2-vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "cp2": ParallelConfig(context_parallel_size=2),
    "ep2": ParallelConfig(expert_model_parallel_size=2),
    "etp2": ParallelConfig(expert_tensor_parallel_size=2),
    "tp2-sp-ep2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
    "tp2-pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
}
RESPONSE_TOKENS = 16
BUCKET = 20 << 20


@dataclass(frozen=True)
class Prompt:
    """A prompt after a sync: all but the unseen image were cached with the previous weights."""

    label: str
    request: RolloutRequest
    encoded: EncodedPrompt


def main() -> None:
    tp, out = int(sys.argv[1]), Path(sys.argv[2])
    models = [argument.split("=") for argument in sys.argv[3:]]
    groups.initialize(ParallelConfig(), seed=1)
    found: dict[str, Any] = {
        f"{kind} memory": memory(Path(checkpoint)) for kind, checkpoint, _ in models if kind != "tied"
    }
    found |= {kind: run(Path(checkpoint), layouts.split(","), tp) for kind, checkpoint, layouts in models}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def run(checkpoint: Path, layouts: Sequence[str], tp: int) -> dict[str, dict[str, Any]]:
    """One engine, and one layout after the other, each with other weights."""
    from prism_megatron.rollout.engine import RolloutEngine
    from prism_megatron.rollout.interface import EngineConfig, Sampling

    engine = RolloutEngine(checkpoint, EngineConfig(tp, "float32", 512, 16, 1.0, 0.5, enforce_eager=True, seed=1))
    sampling = Sampling(1, 0.0, 1.0, RESPONSE_TOKENS)
    processor = ChatProcessor(checkpoint)
    found = {}
    for number, name in enumerate(layouts, start=1):
        prompts = make_prompts(processor, unseen=number)
        seen = [prompt.request for prompt in prompts if prompt.label != "unseen image"]
        before = engine.generate(seen, sampling)
        exported = push(engine, checkpoint, LAYOUTS[name], number)
        answers = engine.generate([prompt.request for prompt in prompts], sampling)
        everybody = gather_over_ranks([rollouts[0] for rollouts in answers])
        if dist.get_rank() == 0:
            hf = hf_model(exported, checkpoint)
            measured = [compare(hf, prompts, rollouts, engine) for rollouts in everybody]
            found[name] = {
                prompt.label: {
                    "greedy": all(rank[i][0] for rank in measured),
                    "logprobs": max(rank[i][1] for rank in measured),
                }
                for i, prompt in enumerate(prompts)
            }
            found[name]["changed"] = tokens(before) != tokens(answers[: len(before)])
            found[name]["versions"] = sorted({rollout.policy_version for rank in everybody for rollout in rank})
    return found


def push(engine: Any, checkpoint: Path, parallel: ParallelConfig, version: int) -> dict[str, Tensor]:
    """New groups, a new model with random weights, one sync; what was exported, on every rank."""
    from megatron.core import parallel_state

    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.convert.transfer import InMemory, export_manifest, export_weights, load_weights
    from prism_megatron.model.build import build_policy
    from prism_megatron.model.sizes import read_sizes
    from prism_megatron.rollout.weight_sync import WeightSync

    parallel_state.destroy_model_parallel()
    groups.initialize(parallel, seed=1)
    sizes = read_sizes(checkpoint)
    table = policy_table(sizes)
    model = build_policy(ModelConfig(str(checkpoint)), parallel, sizes)
    with HFWeights(checkpoint) as weights:
        changed = dict(randomly_changed(weights, version))
    load_weights(model, table, InMemory(changed))
    exported: dict[str, Tensor] = {}

    def remembered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in export_weights(model, table, bucket_bytes=200_000):
            exported[name] = tensor.clone()
            yield name, tensor

    engine.update_weights(remembered(), WeightSync(version, export_manifest(model, table), with_checksums=True))
    assert exported.keys() == changed.keys()
    assert all(torch.equal(tensor, changed[name]) for name, tensor in exported.items())
    return exported


def memory(checkpoint: Path) -> dict[str, int]:
    """Memory of an export in addition to a model of some 100 MB, in buckets and in a single one.

    A layer's experts, if it has some, are larger than a bucket. As in vLLM, the tensors of a module are stored until it
    is complete.
    """
    from megatron.core import parallel_state

    from prism_megatron.convert.export_plan import bucket_in_effect, export_bytes
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.convert.transfer import export_manifest, export_weights
    from prism_megatron.model.build import build_policy
    from prism_megatron.model.sizes import read_sizes
    from tools.bench.harness import extra_peak_bytes, release_freed

    has_experts = read_sizes(checkpoint).num_experts is not None
    parallel = LAYOUTS["pp2" if has_experts else "tp2"]
    parallel_state.destroy_model_parallel()
    groups.initialize(parallel, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((checkpoint / "config.json").read_text())
        config["text_config"] |= {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 14}
        if has_experts:
            config["text_config"] |= {"moe_intermediate_size": 1536, "num_hidden_layers": 6}
        config["vision_config"]["out_hidden_size"] = 512
        (Path(folder) / "config.json").write_text(json.dumps(config))
        sizes = read_sizes(Path(folder))
        model = build_policy(ModelConfig(folder), parallel, sizes)
    table = policy_table(sizes)

    manifest = export_manifest(model, table)
    names = Counter(name.rpartition(".")[0] for name in manifest)

    def consume(bucket_bytes: int) -> None:
        pending: list[Tensor] = []
        for name, tensor in export_weights(model, table, bucket_bytes):
            pending.append(tensor)
            if len(pending) == names[name.rpartition(".")[0]]:
                pending.clear()
            release_freed()
            time.sleep(tensor.nbytes / 2e8)  # the engine's work, while the next part arrives

    consume(BUCKET)
    whole = sum(dtype.itemsize * math.prod(shape) for shape, dtype in manifest.values())
    bound, largest = export_bytes(table, 4, BUCKET)
    return {
        "whole": whole,
        "asked": BUCKET,
        "bucket": bucket_in_effect(BUCKET, largest),
        "bound": bound,
        "buckets": extra_peak_bytes(lambda: consume(BUCKET)),
        "at once": extra_peak_bytes(lambda: consume(4 * whole)),
    }


def randomly_changed(weights: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor moved by half its own spread, norms and biases by a little."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(weights.names):
        tensor = weights[name]
        spread = 0.5 * float(tensor.std()) + 0.05
        yield name, tensor + spread * torch.randn(tensor.shape, generator=generator)


def make_prompts(processor: ChatProcessor, unseen: int) -> list[Prompt]:
    """Text, an image, text longer than vLLM's cache blocks, and an image that only this ``unseen`` has."""
    scenes = sample_scenes(1 + unseen, ShapesConfig())
    question = "How many objects are red?"
    texts = {"text": question, "seen image": f"<image>{question}", "seen long prefix": f"{question} " * 40}
    images_of = {"seen image": scenes[0], "unseen image": scenes[unseen]}
    texts["unseen image"] = texts["seen image"]
    prompts = []
    for label, text in texts.items():
        images = (png(images_of[label]),) if label in images_of else ()
        row = Example(label, (Message("user", text),), images, "test")
        request = RolloutRequest(processor.prompt_ids(row.messages), images, seed=1)
        prompts.append(Prompt(label, request, processor.encode_prompts([row])[0]))
    assert len(prompts[2].request.prompt_token_ids) > 256
    return prompts


def png(image: Any) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return encoded.getvalue()


def hf_model(exported: dict[str, Tensor], checkpoint: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    from tests.models import save_tensors

    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "hf", exported, checkpoint)
        return AutoModelForImageTextToText.from_pretrained(Path(folder) / "hf", dtype=torch.float32)


@torch.no_grad()
def compare(hf: Any, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], engine: Any) -> list[tuple[bool, float]]:
    """Per prompt: whether HF's greedy choice is the engine's at every token, and the largest log-prob difference."""
    found = []
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        visuals = prompt.encoded.visuals
        ids = torch.tensor([prompt.encoded.token_ids + rollout.token_ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if visuals:
            inputs["pixel_values"] = torch.cat([visual.patches for visual in visuals])
            inputs["image_grid_thw"] = torch.tensor([visual.grid for visual in visuals])
            inputs["mm_token_type_ids"] = (ids == hf.config.image_token_id).int()
        logits = hf(**inputs).logits[0, len(prompt.encoded.token_ids) - 1 : -1]
        chosen = torch.tensor(rollout.token_ids)
        expected = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        allowed = logits.index_fill(1, torch.tensor(engine.banned_token_ids), -torch.inf)
        found.append(
            (torch.equal(allowed.argmax(-1), chosen), float((expected - torch.tensor(rollout.logprobs)).abs().max()))
        )
    return found


def tokens(answers: Sequence[Sequence[Rollout]]) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollouts in answers for rollout in rollouts]


if __name__ == "__main__":
    main()
