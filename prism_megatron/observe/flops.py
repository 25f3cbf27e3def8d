"""Floating-point operations of a training step, computed from sizes.

A multiplication and an addition are two operations; only matrix products are counted. ``model`` are the operations that
the mathematics needs (for MFU), ``recomputed`` those that are done twice (HFU counts both). Attention of a causal token
counts the tokens it attends to. A frozen part costs its forward pass, and the gradient of its input if something before
it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Dense BF16 peak of one GPU, FLOP/s, from its data sheet. FP8 runs are divided by the same number.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Workload:
    """Sizes of the sequences that are trained on.

    Attributes:
        sequence_lengths: tokens of each sequence.
        frame_patches: patches of each distinct image frame.
        scored_tokens: tokens whose log-probabilities are computed.
        scored_sequences: sequences that each of ``score_heads`` heads of a discriminator scores.
        known_prefixes: lengths of prefixes that are computed with another sequence.
        read_tokens: tokens that the last layer's MLP computes; None for all.
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
    """Operations of a forward and backward pass by part, and those recomputed in the backward pass."""

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
    """Return the operations of one training pass over ``work``, summed over ranks.

    Args:
        text: the text part of an HF ``config.json``.
        vision: its vision part.
        work: sizes of the sequences.
        freeze: parts of the model that are not trained, as in ModelConfig.
        recompute: layers are recomputed in the backward pass.
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
    # Logits are always recomputed (model/logprobs.py), layers if the recipe says so.
    again = (head if any_trained else 0.0) + (language + attention if recompute and any_trained else 0.0)
    return TrainingFlops(parts, again)


def forward_flops(text: Mapping[str, Any], vision: Mapping[str, Any], work: Workload) -> TrainingFlops:
    """Return the operations of one pass over ``work`` without gradient."""
    return training_flops(text, vision, work, ("vision", "merger", "language_model"))


def peak_flops(device_name: str) -> float | None:
    """Return the dense BF16 FLOP/s of a GPU by its name; None if it is not listed."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def _passes(trained: bool, input_needs_gradient: bool) -> int:
    """Count the products of a linear layer: forward, gradient of its weight, gradient of its input."""
    return 1 + trained + input_needs_gradient


def _language(text: Mapping[str, Any], work: Workload) -> tuple[float, float]:
    """Return forward operations of the decoder's linear layers, and of its causal attention."""
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
    """Count the pairs of a token and one that it attends to, itself included."""
    return length * (length + 1) // 2


def _vision(vision: Mapping[str, Any], frames: Sequence[int]) -> tuple[float, float, float]:
    """Return forward operations of the patch embedding, the tower's linear layers and its attention per frame."""
    hidden, patches = vision["hidden_size"], sum(frames)
    patch = vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    weights = 4 * hidden**2 + 2 * hidden * vision["intermediate_size"]
    seen = sum(frame**2 for frame in frames)
    depth = vision["depth"]
    return 2.0 * patches * patch * hidden, 2.0 * depth * weights * patches, 4.0 * depth * hidden * seen


def _mergers(vision: Mapping[str, Any], patches: int) -> float:
    """Return forward operations of the two linear layers of all mergers."""
    merged = vision["hidden_size"] * vision["spatial_merge_size"] ** 2
    rows = patches // vision["spatial_merge_size"] ** 2 * (1 + len(vision["deepstack_visual_indexes"]))
    operations: float = 2.0 * rows * (merged**2 + merged * vision["out_hidden_size"])
    return operations
