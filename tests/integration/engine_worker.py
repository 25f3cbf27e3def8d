"""Runs under torchrun: the rollout engine before and after weight updates, against HF and the trainer.

Arguments: two checkpoints (the engine starts on the first), a prompt file, tensor-parallel size, where to write.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from PIL import ExifTags, Image

from prism_megatron.config import ParallelConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.data.images import decode_image
from prism_megatron.parallel import groups
from prism_megatron.types import EncodedPrompt, Example, Rollout, RolloutRequest

RESPONSE_TOKENS = 24
PIXELS = (10_000, 20_000)  # the task's images have fewer, so that both sides scale them
VISUAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def main() -> None:
    first, second, prompts = (Path(argument) for argument in sys.argv[1:4])
    tp = int(sys.argv[4])
    groups.initialize(ParallelConfig(tensor_model_parallel_size=tp), seed=1)
    from transformers import AutoModelForImageTextToText

    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.rollout.engine import RolloutEngine
    from prism_megatron.rollout.interface import EngineConfig, Sampling
    from prism_megatron.rollout.weight_sync import WeightSync

    processor = ChatProcessor(first, *PIXELS)
    rows = unusual(read_rlvr(prompts)[:6])
    encoded = processor.encode_prompts(rows)
    requests = [RolloutRequest(processor.prompt_ids(row.messages), row.images, seed) for seed, row in enumerate(rows)]
    sampling = Sampling(n=3, temperature=1.0, top_p=1.0, max_tokens=RESPONSE_TOKENS)
    config = EngineConfig(tp, "float32", 512, 32, 1.0, 0.5, enforce_eager=True, seed=1)
    engine = RolloutEngine(first, replace(config, min_pixels=PIXELS[0], max_pixels=PIXELS[1]))
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()

    def compare(checkpoint: Path, answers: Sequence[Sequence[Rollout]], temperature: float = 1.0) -> float:
        hf = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        return max(
            logprob_difference(hf, prompt, rollout, temperature)
            for prompt, rollouts in zip(encoded, answers, strict=True)
            for rollout in rollouts
        )

    measured: dict[str, Any] = {}
    answers = engine.generate(requests, sampling)
    measured["first"] = compare(first, answers)
    measured["same_seeds_same_tokens"] = tokens(engine.generate(requests, sampling)) == tokens(answers)
    measured["samples_differ"] = len({rollout.token_ids for rollout in answers[0]}) > 1
    # The cut batch is seen with other neighbours; the seeds are the same.
    alone = engine.generate(requests[2:3], sampling)
    measured["alone_same_tokens"] = tokens(alone) == tokens(answers[2:3])

    # The same prompts again: prefixes and pictures of the old weights are in every cache.
    with HFWeights(second) as weights:
        named = [(name, weights[name]) for name in sorted(weights.names)]
    manifest = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named}
    engine.update_weights(named, WeightSync(1, manifest, with_checksums=True))
    updated = engine.generate(requests, sampling)
    measured["versions"] = sorted({rollout.policy_version for rollouts in updated for rollout in rollouts})
    measured["version_at_start"] = answers[0][0].policy_version
    measured["second"] = compare(second, updated)
    measured["update_changes_tokens"] = tokens(updated) != tokens(answers)
    cold = replace(sampling, temperature=0.5)
    tempered = engine.generate(requests, cold)
    measured["cold"] = compare(second, tempered, temperature=0.5)
    measured["cold_is_likelier"] = mean_logprob(tempered) - mean_logprob(updated)
    said = {
        token for rollouts in (*answers, *updated, *tempered) for rollout in rollouts for token in rollout.token_ids
    }
    measured["visual_tokens"] = sorted(said & {processor.tokenizer.convert_tokens_to_ids(name) for name in VISUAL})
    greedy = engine.generate(requests, Sampling(1, 0.0, 1.0, RESPONSE_TOKENS))
    measured["greedy"] = compare(second, greedy)
    measured["process_untouched"] = bool(
        torch.equal(random_state, torch.get_rng_state()) and threads == torch.get_num_threads()
    )

    for label, tensors in (("missing", named[1:]), ("unknown", [*named, ("nobody", torch.ones(1))])):
        try:
            engine.update_weights(tensors, WeightSync(2, manifest))
        except ValueError as error:
            measured[label] = str(error)
    try:
        engine.generate(requests, sampling)
    except RuntimeError as error:
        measured["refused"] = str(error)
    if tp > 1:
        drifted = dict(named)
        name = next(name for name in drifted if name.endswith("layernorm.weight"))
        drifted[name] = drifted[name] + torch.distributed.get_rank()
        try:
            engine.update_weights(drifted.items(), WeightSync(2, manifest, with_checksums=True))
        except ValueError as error:
            measured["drifted"] = str(error)
    engine.update_weights(named, WeightSync(3, manifest))
    measured["recovers"] = tokens(engine.generate(requests, sampling)) == tokens(updated)
    try:
        engine.generate(requests, Sampling(1, 1.0, 1.0, 600))
    except ValueError as error:
        measured["too_long"] = str(error)

    measured["nothing_asked"] = engine.generate([], sampling)
    engine._config = replace(engine._config, timeout_seconds=1e-3)
    try:
        engine.generate(requests, sampling)
    except TimeoutError as error:
        measured["timeout"] = str(error)
    engine._config = replace(engine._config, timeout_seconds=None)
    measured["goes_on_after_timeout"] = tokens(engine.generate(requests, sampling)) == tokens(updated)

    half = len(named) // 2
    for label, tensors in (("dropped", named[half:]), ("doubled", [*named[:half], *named[half - 3 :]])):
        try:
            engine.update_weights(tensors, WeightSync(4, manifest))
        except ValueError as error:
            measured[label] = str(error)
    engine.update_weights(named, WeightSync(5, manifest))
    measured["recovers_midway"] = tokens(engine.generate(requests, sampling)) == tokens(updated)

    measured["guard"] = guard_findings(engine, first, processor, rows, tp)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[5]).write_text(json.dumps(measured))
    groups.shutdown()


def unusual(rows: list[Example]) -> list[Example]:
    """The rows with a picture that lies on its side, one on transparency, none, and special tokens spelled out."""
    turned, clear = io.BytesIO(), io.BytesIO()
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    decode_image(rows[1].images[0]).resize((160, 64)).save(turned, "PNG", exif=orientation)
    layer = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    layer.paste((200, 30, 0, 128), (8, 8, 60, 40))
    layer.save(clear, "PNG")
    (question,) = rows[3].messages
    spelled = replace(question, content=f"{question.content} {' '.join(VISUAL)} <|im_end|>")
    (asked,) = rows[4].messages
    bare = replace(asked, content=asked.content.replace("<image>", ""))
    return [
        rows[0],
        replace(rows[1], images=(turned.getvalue(),)),
        replace(rows[2], images=(clear.getvalue(),)),
        replace(rows[3], messages=(spelled,)),
        replace(rows[4], messages=(bare,), images=()),
        rows[5],
    ]


def guard_findings(
    engine: Any, checkpoint: Path, processor: ChatProcessor, rows: Sequence[Example], tp: int
) -> dict[str, str]:
    """Error of the sync guard for each parameter or cache that a sync left out."""
    from prism_megatron.config import apply_overrides
    from prism_megatron.rollout import transfer_backend
    from prism_megatron.stages.rollouts import Sampler
    from prism_megatron.stages.setup import load_policy
    from prism_megatron.stages.sync_guard import SyncGuard
    from recipes import STAGE_RECIPES

    degree = f"parallel.tensor_model_parallel_size={tp}"
    config = apply_overrides(
        STAGE_RECIPES["tiny_rlvr"](), [f"model.hf_checkpoint={checkpoint}", degree, "rollout.guard_interval=1"]
    )
    guard = SyncGuard(Sampler(engine, processor, config), load_policy(config), rows)
    found = {}

    def push(label: str) -> None:
        try:
            guard.push(7)
        except (RuntimeError, AttributeError) as error:
            found[label] = str(error)

    push("nothing")
    for name in engine._resets():

        def update(named: Any, sync: Any, name: str = name) -> None:
            with patch.object(engine, "reset_caches", lambda: reset_all_but(engine, name)):
                type(engine).update_weights(engine, named, sync)

        with patch.object(engine, "update_weights", update):
            push(name)
    with patch.object(transfer_backend, "pack_tied_output", lambda model: None):
        push("tied output")
    with patch.object(transfer_backend, "initialize_layerwise_reload", lambda model: None):
        push("layerwise reload")
    load = transfer_backend.SameProcessTransfer.receive_weights
    for lost in ("layers.1.self_attn.v_proj.weight", "blocks.1.norm1.weight", "embed_tokens.weight"):

        def receive(self: Any, info: Any, lost: str = lost) -> None:
            # Damaged behind the check of what is sent.
            damaged = ((name, tensor / 2 if name.endswith(lost) else tensor) for name, tensor in info.named)
            load(self, transfer_backend.NamedTensors(damaged))

        with patch.object(transfer_backend.SameProcessTransfer, "receive_weights", receive):
            push(lost)
    push("nothing again")
    return found


def reset_all_but(engine: Any, excluded: str) -> None:
    for name, reset in engine._resets().items():
        if name != excluded:
            reset()


def logprob_difference(hf: Any, prompt: EncodedPrompt, rollout: Rollout, temperature: float) -> float:
    """Largest difference between the engine's log-probabilities of a response and HF's at the same temperature."""
    ids = torch.tensor([prompt.token_ids + rollout.token_ids])
    images = {}
    if prompt.visuals:
        images = {
            "pixel_values": torch.cat([visual.patches for visual in prompt.visuals]),
            "image_grid_thw": torch.tensor([visual.grid for visual in prompt.visuals]),
            "mm_token_type_ids": (ids == hf.config.image_token_id).int(),
        }
    with torch.no_grad():
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[
            0, len(prompt.token_ids) - 1 : -1
        ]
    expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
    return float((expected - torch.tensor(rollout.logprobs)).abs().max())


def mean_logprob(answers: Sequence[Sequence[Rollout]]) -> float:
    return mean(value for rollouts in answers for rollout in rollouts for value in rollout.logprobs)


def tokens(answers: Sequence[Sequence[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in rollouts] for rollouts in answers]


if __name__ == "__main__":
    main()
