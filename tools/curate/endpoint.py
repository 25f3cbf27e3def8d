"""Models behind OpenAI's chat protocol, and their replies, each asked and paid for once."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai

from prism_megatron.errors import UserError
from prism_megatron.files import JSONLines, read_json_lines
from prism_megatron.observe.progress import ProgressBar
from prism_megatron.types import IMAGE_PLACEHOLDER, Example, Message

# Bad request, too large, unprocessable: this request's own fault. The client tries again what may pass (time-outs, 409,
# 429, 5xx); the rest (a wrong key, an unknown model) is every request's fault and stops the command.
_REFUSALS = (400, 413, 422)


@dataclass(frozen=True)
class Endpoint:
    """A model behind OpenAI's chat protocol. Prices are per million tokens; the key never leaves the environment."""

    url: str
    model: str
    key_variable: str
    max_tokens: int
    temperature: float
    price_in: float = 0.0
    price_out: float = 0.0

    def client(self, retries: int, timeout: float) -> openai.OpenAI:
        key = os.environ.get(self.key_variable, "")
        local = self.url.startswith(("http://localhost", "http://127.0.0.1"))
        if not key and not local:
            raise UserError(f"{self.url} needs a key; set the environment variable {self.key_variable}")
        return openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=retries, timeout=timeout)


@dataclass(frozen=True)
class Answer:
    """One reply, as it is kept: ``kind`` is student, teacher or verifier, ``number`` counts the replies to ``request``.

    ``request`` is the hash of what was asked: model, chat, images and sampling, but not the address.
    """

    kind: str
    model: str
    row_id: str
    number: int
    request: str
    text: str
    finished: bool
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Refusal:
    """Why an endpoint does not answer a row's prompt. It is not kept: nothing was paid, and it may be mended."""

    row_id: str
    reason: str


@dataclass(frozen=True)
class _Question:
    row: Example
    chat: Sequence[Message]
    number: int
    request: str


class Answers:
    """Replies so far, kept in a file that only grows: what is in it is not asked (or paid for) again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[tuple[str, str, str, int], Answer] = {}
        for record in read_json_lines(path, lambda value: isinstance(value, dict)):
            if "request" not in record:
                raise UserError(
                    f"{path} has replies without a hash of what was asked, so nobody knows what they answer; "
                    "choose another --out, or move the file away"
                )
            self._keep(Answer(**record))

    def _keep(self, answer: Answer) -> None:
        self._kept[answer.kind, answer.row_id, answer.request, answer.number] = answer

    def ask(
        self,
        kind: str,
        endpoint: Endpoint,
        wanted: Sequence[tuple[Example, Sequence[Message]]],
        workers: int,
        client: openai.OpenAI,
        samples: int = 1,
    ) -> tuple[dict[str, list[Answer]], dict[str, str]]:
        """Each row's replies by its id, and the reasons why the rows that have none were refused.

        Asks what is not there yet and writes each reply when it comes. Raises openai.APIError where an endpoint keeps
        failing, once the replies that were under way are written.
        """
        questions = [
            _Question(row, chat, number, request)
            for row, chat in wanted
            for request in [_request_hash(endpoint, chat, row.images)]
            for number in range(samples)
        ]
        open_ = [q for q in questions if (kind, q.row.id, q.request, q.number) not in self._kept]
        refused = self._ask_open(kind, endpoint, open_, workers, client) if open_ else {}
        replies: dict[str, list[Answer]] = {}
        for question in questions:
            if question.row.id not in refused:
                answer = self._kept[kind, question.row.id, question.request, question.number]
                replies.setdefault(question.row.id, []).append(answer)
        return replies, refused

    def _ask_open(
        self, kind: str, endpoint: Endpoint, open_: Sequence[_Question], workers: int, client: openai.OpenAI
    ) -> dict[str, str]:
        refused: dict[str, str] = {}
        failure: openai.APIError | None = None
        stopped = threading.Event()

        def reply(question: _Question) -> Answer | Refusal | None:
            return None if stopped.is_set() else _reply(kind, endpoint, client, question)

        bar = ProgressBar(kind, len(open_), with_lines=True)
        with JSONLines(self._path) as file, bar, ThreadPoolExecutor(workers) as pool:
            try:
                for done, future in enumerate(as_completed([pool.submit(reply, q) for q in open_]), 1):
                    try:
                        answer = future.result()
                    except openai.APIError as error:
                        failure = failure or error
                        stopped.set()
                        continue
                    if isinstance(answer, Refusal):
                        refused[answer.row_id] = answer.reason
                    elif answer is not None:
                        self._keep(answer)
                        file.append(asdict(answer))
                    if failure is None:
                        bar.update(done)
            finally:
                stopped.set()  # an interrupt does not wait for all that is queued
        if failure is not None:
            raise failure
        return refused

    def cost(self, kind: str, endpoint: Endpoint) -> dict[str, float]:
        """All that was paid for in this folder, for this run or one before it."""
        answers = [a for a in self._kept.values() if a.kind == kind and a.model == endpoint.model]
        tokens_in, tokens_out = sum(a.tokens_in for a in answers), sum(a.tokens_out for a in answers)
        price = (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6
        return {"requests": len(answers), "tokens_in": tokens_in, "tokens_out": tokens_out, "price": price}


def _request_hash(endpoint: Endpoint, chat: Sequence[Message], images: Sequence[bytes]) -> str:
    asked = [
        *(endpoint.model, endpoint.max_tokens, endpoint.temperature),
        [[message.role, message.content] for message in chat],
        [hashlib.sha256(image).hexdigest() for image in images],
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _reply(kind: str, endpoint: Endpoint, client: openai.OpenAI, question: _Question) -> Answer | Refusal:
    row = question.row
    try:
        completion = client.chat.completions.create(
            model=endpoint.model,
            messages=_chat(question.chat, row.images),
            max_tokens=endpoint.max_tokens,
            temperature=endpoint.temperature,
        )
    except openai.APIStatusError as error:
        if error.status_code not in _REFUSALS:
            raise
        return Refusal(row.id, str(error))
    choice, usage = completion.choices[0], completion.usage
    assert usage is not None, "OpenAI's protocol reports usage in every reply that is not streamed"
    return Answer(
        *(kind, endpoint.model, row.id, question.number, question.request),
        text=choice.message.content or "",
        finished=choice.finish_reason == "stop",
        tokens_in=usage.prompt_tokens,
        tokens_out=usage.completion_tokens,
    )


def _chat(messages: Sequence[Message], images: Sequence[bytes]) -> Any:
    """OpenAI's messages, each placeholder replaced by its image."""
    remaining = iter(images)
    chat = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for index, text in enumerate(message.content.split(IMAGE_PLACEHOLDER)):
            if index:
                data = base64.b64encode(next(remaining)).decode()
                parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
            if text:
                parts.append({"type": "text", "text": text})
        chat.append({"role": message.role, "content": parts})
    return chat
