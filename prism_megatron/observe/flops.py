"""How many floating-point operations a training step takes, from sizes alone.

A multiplication and an addition are two operations; only matrix products are counted. ``model`` is what the mathematics
needs (MFU divides by it), ``recomputed`` what is done twice on top (HFU divides by both). A causal token is charged for
the tokens it sees and no others, so packing saves what it should. A frozen part costs its forward pass, and the
gradient of its input where something before it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Dense BF16 peak of one GPU, FLOP/s, as its data sheet has it. FP8 runs are divided by the same number.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Workload:
    """What is trained on: tokens of each sequence, patches of each distinct image frame, tokens that are scored.

    ``scored_sequences`` are a discriminator's: each is read once by ``score_heads`` heads. ``known_prefixes`` are
    lengths of beginnings that were computed with another sequence already. The last layer's MLP is needed for
    ``read_tokens`` only; None: for all.
    """

    sequence_lengths: Sequence[int]
    frame_patches: Sequence[int]
    scored_tokens: int = 0
    scored_sequences: int = 0
    score_heads: int = 0
    known_prefixes: Sequence[int] = ()
    read_tokens: int | None = None


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a forward and backward pass, by part, and those done again in the backward pass."""

    parts: dict[str, float]
    recomputed: float

    @property
    def model(self) -> float:
        return sum(self.parts.values())

    @property
    def hardware(self) -> float:
        return self.model + self.recomputed


def training_flops(
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    work: Workload,
    freeze: Iterable[str] = (),
    recompute: bool = False,
) -> TrainingFlops:
    """Operations of one pass over ``work`` on all ranks together.

    ``text`` and ``vision`` are the halves of an HF ``config.json``, ``freeze`` and ``recompute`` as in ModelConfig.
    """
    frozen = set(freeze)
    vision_trained, merger_trained = "vision" not in frozen, "merger" not in frozen
    text_trained = "language_model" not in frozen
    any_trained = vision_trained or merger_trained or text_trained

    language, attention = _language(text, work)
    head = 2.0 * work.scored_tokens * text["hidden_size"] * text["vocab_size"]
    scores = 2.0 * work.scored_sequences * work.score_heads * text["hidden_size"]
    embed, layers, vision_attention = _vision(vision, work.frame_patches)
    linear = _passes(text_trained, any_trained)
    parts = {
        "language": language * linear,
        "attention": attention * (3 if any_trained else 1),
        "head": (head + scores) * linear,
        "vision": embed * _passes(vision_trained, False) + layers * _passes(vision_trained, vision_trained),
        "vision_attention": vision_attention * (3 if vision_trained else 1),
        # A merger's own norm comes before its first linear layer, so a trained merger needs both gradients of both.
        "merger": _mergers(vision, sum(work.frame_patches)) * _passes(merger_trained, merger_trained or vision_trained),
    }
    # Logits are never kept (model/logprobs.py); layers are where the recipe says so.
    again = (head if any_trained else 0.0) + (language + attention if recompute and any_trained else 0.0)
    return TrainingFlops(parts, again)


def forward_flops(text: Mapping[str, Any], vision: Mapping[str, Any], work: Workload) -> TrainingFlops:
    """Operations of one pass over ``work`` without gradient."""
    return training_flops(text, vision, work, ("vision", "merger", "language_model"))


def peak_flops(device_name: str) -> float | None:
    """Dense BF16 FLOP/s of a GPU by its name, None where we do not know it."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def _passes(trained: bool, input_needs_gradient: bool) -> int:
    """Products of a linear layer's size: forward, gradient of its weight, gradient of its input."""
    return 1 + trained + input_needs_gradient


def _language(text: Mapping[str, Any], work: Workload) -> tuple[float, float]:
    """Forward operations of the decoder's linear layers, and of its causal attention."""
    hidden, width = text["hidden_size"], text["num_attention_heads"] * text["head_dim"]
    grouped = text["num_key_value_heads"] * text["head_dim"]
    experts = text.get("num_experts", text.get("num_local_experts"))
    if experts is None:
        mlp = 3 * hidden * text["intermediate_size"]
    else:
        mlp = text["num_experts_per_tok"] * 3 * hidden * text["moe_intermediate_size"] + hidden * experts
    around = hidden * (width + 2 * grouped) + width * hidden
    tokens = sum(work.sequence_lengths) - sum(work.known_prefixes)
    read = tokens if work.read_tokens is None else work.read_tokens
    layers = text["num_hidden_layers"]
    seen = sum(map(_triangle, work.sequence_lengths)) - sum(map(_triangle, work.known_prefixes))
    linear = layers * around * tokens + mlp * ((layers - 1) * tokens + read)
    return 2.0 * linear, 4.0 * layers * width * seen


def _triangle(length: int) -> int:
    """Pairs of a token and one that it sees."""
    return length * (length + 1) // 2


def _vision(vision: Mapping[str, Any], frames: Sequence[int]) -> tuple[float, float, float]:
    """Forward operations of the patch embedding, the tower's linear layers and its attention inside each frame."""
    hidden, patches = vision["hidden_size"], sum(frames)
    patch = vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    weights = 4 * hidden**2 + 2 * hidden * vision["intermediate_size"]
    seen = sum(frame**2 for frame in frames)
    depth = vision["depth"]
    return 2.0 * patches * patch * hidden, 2.0 * depth * weights * patches, 4.0 * depth * hidden * seen


def _mergers(vision: Mapping[str, Any], patches: int) -> float:
    """Forward operations of the two linear layers of all mergers."""
    merged = vision["hidden_size"] * vision["spatial_merge_size"] ** 2
    rows = patches // vision["spatial_merge_size"] ** 2 * (1 + len(vision["deepstack_visual_indexes"]))
    operations: float = 2.0 * rows * (merged**2 + merged * vision["out_hidden_size"])
    return operations
