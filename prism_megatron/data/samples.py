"""A sampled response with its prompt and its verdict."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.response import Response
from prism_megatron.types import EncodedPrompt, Example, Rollout


@dataclass(frozen=True)
class Sample:
    """One rollout and the prompt it answers.

    ``response`` is None outside the grammar, where ``correct`` is False. Samples of one prompt have the same ``group``.
    """

    example: Example
    prompt: EncodedPrompt
    rollout: Rollout
    response: Response | None
    correct: bool
    group: int

    def sequence(self) -> TrainingSequence:
        return TrainingSequence(self.prompt, self.rollout.token_ids)
