"""The records that travel between layers. Plain data: no Megatron, no vLLM, no behaviour.

Tensor letters used everywhere: T tokens of a packed batch, N sequences or rollouts, P image patches, V merged visual
tokens, H hidden size, D DeepStack levels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these records are read where nothing is computed, too
    import torch
    from torch import Tensor

# The discriminator's two branches, as they are numbered in ``branch_ids``.
PERCEPTION, REASONING = 0, 1
BRANCH_NAMES = ("perception", "reasoning")


IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Message:
    """One chat turn. ``content`` holds one ``<image>`` placeholder per image the turn shows."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One question about one or more images, whichever file it was read from.

    ``messages`` ends with the user's turn. ``response`` is a full demonstration in the response grammar;
    ``teacher_caption`` and ``teacher_reasoning`` are its two halves as the discriminator sees them (with tags).
    ``equivalent_answers`` are right, too.
    ``source`` says where the row came from ("alignment.parquet, row 12") and is quoted in every error about it.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    source: str
    response: str | None = None
    answer: str | None = None
    equivalent_answers: tuple[str, ...] = ()
    teacher_caption: str | None = None
    teacher_reasoning: str | None = None
    data_source: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferencePair:
    """One line of the discriminator's warm-up file (spec 1.5): the same prompt answered by teacher and student."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    source: str
    teacher_caption: str
    teacher_reasoning: str
    student_caption: str
    student_reasoning: str


@dataclass(frozen=True)
class RolloutRequest:
    """A request for the engine: token ids with one image token per image, the encoded images, and a seed."""

    prompt_token_ids: tuple[int, ...]
    images: tuple[bytes, ...]
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response. ``logprobs[i]`` is the engine's log-probability of ``token_ids[i]`` (nats).

    ``policy_version`` is that of the weights it was sampled with; None: those the engine started on.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool
    policy_version: int | None


@dataclass(frozen=True, eq=False)
class Visual:
    """An image or a video, cut into patches. Whoever shows it again passes this very object: it is encoded once.

    ``patches`` is [P, patch_dim] float32, ``grid`` is (time, height, width) in patches, P their product.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    is_video: bool = False


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt as the trainer sees it: a visual token for every merged patch, and ``visuals`` in the order shown.

    ``loss_spans`` are [start, end) of tokens that are trained on: earlier answers in a chat of several turns.
    """

    token_ids: tuple[int, ...]
    visuals: tuple[Visual, ...] = ()
    loss_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """Properties of a model for packing: visual tokens, sizes of patches and of merged patches, longest position."""

    image_token_id: int
    video_token_id: int
    merge_size: int
    patch_dim: int
    max_positions: int


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end (Megatron's THD), each seeing only itself, each padded at its end where needed.

    tokens, targets        [T] int64; ``targets[t]`` is the token after ``tokens[t]`` in the same sequence (0: none)
    loss_mask              [T] float32, 1 where ``targets[t]`` is trained on
    position_ids           [3, T] int64, M-RoPE (time, height, width)
    cu_seqlens             [N+1] int32, padding included; a last sequence may be nothing but padding
    pixel_values           [P, patch_dim] float32; each distinct image once, a blank one where there is none
    grid_thw               [images, 3] int64, in patches
    visual_index           [T] int64: row of the merged visual features that replaces this token, -1 for text
    sequence_ids           [T] int64 in [0, N)
    last_tokens            [sequences] int64, where each real sequence ends
    branch_ids             [sequences] int64 or None: 0 perception, 1 reasoning (discriminator only)
    embedding_noise        [T, H] float32 or None: added to the embedded tokens
    prefix                 [N] int64 or None: the sequence that each one goes on from and sees whole, -1 for none
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    pixel_values: Tensor
    grid_thw: Tensor
    visual_index: Tensor
    sequence_ids: Tensor
    last_tokens: Tensor
    branch_ids: Tensor | None = None
    embedding_noise: Tensor | None = None
    prefix: Tensor | None = None

    def to(self, device: torch.device) -> PackedBatch:
        from torch import Tensor

        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return dataclasses.replace(self, **moved)
