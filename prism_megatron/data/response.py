"""The response grammar (spec 1.1): the only module that knows what a PRISM response looks like.

A response is ``<caption>…</caption> <think>…</think> <answer>…</answer>`` with nothing but white space between and
around the blocks. The paper's expression also accepts repeated tags and empty blocks, which lets a policy earn the
format reward with text that has no single reading (spec 9.1, D7). Here every tag occurs exactly once and every block
says something.
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
# The paper's expressions (spec 1.1).
_REFERENCE = re.compile(
    r"\s*<caption>(?P<caption>.*?)</caption>\s*<think>(?P<think>.*?)</think>(?P<gap>\s*)<answer>(?P<answer>.*?)</answer>\s*",
    re.DOTALL,
)
_FIRST_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Response:
    """The three blocks of a response, each exactly as written between its tags (white space included).

    ``gap`` is the white space between ``</think>`` and ``<answer>``, kept so that ``reasoning_block`` is verbatim.
    """

    caption: str
    think: str
    answer: str
    gap: str = "\n"

    @property
    def caption_block(self) -> str:
        """What the perception branch of the discriminator reads: the paper's c (Eq. 1)."""
        return f"<caption>{self.caption}</caption>"

    @property
    def reasoning_block(self) -> str:
        """What the reasoning branch of the discriminator reads: the paper's t (Eq. 1), reasoning and answer."""
        return f"<think>{self.think}</think>{self.gap}<answer>{self.answer}</answer>"


def parse_response(text: str, *, compat: str = "fixed") -> Response | None:
    """Split a whole response into its blocks, or return None where it breaks the grammar.

    ``compat`` reference accepts what the paper's code accepts: empty blocks, and tags inside of blocks.
    """
    if compat == "reference":
        match = _REFERENCE.fullmatch(text)
        return Response(**match.groupdict()) if match else None
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    match = _RESPONSE.fullmatch(text)
    if match is None:
        return None
    response = Response(**match.groupdict())
    blocks = (response.caption, response.think, response.answer)
    return response if all(block.strip() for block in blocks) else None


def first_answer(text: str) -> str:
    """The answer that the paper's code judges: the first in the text, wherever it stands."""
    match = _FIRST_ANSWER.search(text)
    return match[1] if match else ""


def render_response(caption: str, think: str, answer: str) -> str:
    """Write a response in the canonical layout: one block after the other, a line break between them.

    Raises:
        UserError: a block is empty or contains a tag, so that the text could not be parsed back.
    """
    response = Response(caption, think, answer)
    text = f"{response.caption_block}\n{response.reasoning_block}"
    if parse_response(text) != response:
        raise UserError(f"caption, think and answer must be non-empty and free of {' '.join(TAGS)}; got {response!r}")
    return text
