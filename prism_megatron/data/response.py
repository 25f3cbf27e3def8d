"""The response grammar (spec 1.1): the only module that knows the format of a PRISM response.

A response is ``<caption>…</caption> <think>…</think> <answer>…</answer>`` with only white space between and around the
blocks. Every tag occurs exactly once and no block is empty, so that a text has at most one reading. The paper's
expression also accepts repeated tags and empty blocks (spec 9.1, D7; :mod:`prism_megatron.reference.verifiable`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prism_megatron.errors import UserError

SYSTEM_PROMPT = """\
You are a helpful scientific assistant.
Answer the user's question based on the image provided.

Your output must strictly follow this XML format:

<caption>
- [Briefly describe the image style, key objects, and text using bullet points]
</caption>
<think>
[Reason step-by-step to solve the problem]
</think>
<answer>
[Final answer ONLY]
</answer>"""

TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")

_RESPONSE = re.compile(
    r"\s*<caption>(?P<caption>.*)</caption>\s*<think>(?P<think>.*)</think>(?P<gap>\s*)<answer>(?P<answer>.*)</answer>\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Response:
    """The three blocks of a response, each exactly as written between its tags (white space included).

    ``gap`` is the white space between ``</think>`` and ``<answer>``, which makes ``reasoning_block`` verbatim.
    """

    caption: str
    think: str
    answer: str
    gap: str = "\n"

    @property
    def caption_block(self) -> str:
        """The input of the discriminator's perception branch: the paper's c (Eq. 1)."""
        return f"<caption>{self.caption}</caption>"

    @property
    def reasoning_block(self) -> str:
        """The input of the discriminator's reasoning branch: the paper's t (Eq. 1), reasoning and answer."""
        return f"<think>{self.think}</think>{self.gap}<answer>{self.answer}</answer>"


def parse_response(text: str) -> Response | None:
    """Split a complete response into its blocks; None if it breaks the grammar."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    match = _RESPONSE.fullmatch(text)
    if match is None:
        return None
    response = Response(**match.groupdict())
    blocks = (response.caption, response.think, response.answer)
    return response if all(block.strip() for block in blocks) else None


def render_response(caption: str, think: str, answer: str) -> str:
    """Write a response in the canonical layout: one block after the other, a line break between them.

    Raises:
        UserError: A block is empty or contains a tag, so that the text could not be parsed back.
    """
    response = Response(caption, think, answer)
    text = f"{response.caption_block}\n{response.reasoning_block}"
    if parse_response(text) != response:
        raise UserError(f"caption, think and answer must be non-empty and free of {' '.join(TAGS)}; got {response!r}")
    return text
