"""Endpoints with OpenAI's chat protocol, and their replies, which are saved."""

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

# Bad request, too large, unprocessable: errors of one request. The client retries time-outs, 409, 429 and 5xx; any
# other error (a wrong key, an unknown model) concerns every request and stops the command.
_REFUSALS = (400, 413, 422)


@dataclass(frozen=True)
class Endpoint:
    """Model with OpenAI's chat protocol. Prices are per million tokens; the key is read from the environment."""

    url: str
    model: str
    key_variable: str
    max_tokens: int
    temperature: float
    price_in: float = 0.0
    price_out: float = 0.0

    def client(self, requests: Requests) -> openai.OpenAI:
        key = os.environ.get(self.key_variable, "")
        local = self.url.startswith(("http://localhost", "http://127.0.0.1"))
        if not key and not local:
            raise UserError(f"{self.url} needs a key; set the environment variable {self.key_variable}")
        return openai.OpenAI(
            base_url=self.url,
            api_key=key or "none",
            max_retries=requests.retries,
            timeout=requests.timeout_seconds,
        )


@dataclass(frozen=True)
class Requests:
    """Options of the requests to all endpoints. ``retries`` are the openai client's, with its own back-off."""

    workers: int = 32
    retries: int = 8
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class Answer:
    """Reply of an endpoint: ``kind`` is student, teacher or verifier, ``number`` counts the replies to ``request``.

    ``request`` is a hash of the model, chat, images and sampling options, but not of the address.
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
    """Reason why an endpoint refuses a row's prompt. It is not saved: it cost nothing, and may be resolved."""

    row_id: str
    reason: str


@dataclass(frozen=True)
class _Question:
    row: Example
    chat: Sequence[Message]
    number: int
    request: str


class Answers:
    """Saved replies, in a file that only grows, so that no request is sent and paid for twice."""

    def __init__(self, path: Path, requests: Requests) -> None:
        self._path, self._requests = path, requests
        self._saved: dict[tuple[str, str, str, int], Answer] = {}
        for record in read_json_lines(path, lambda value: isinstance(value, dict)):
            if "request" not in record:
                raise UserError(
                    f"{path} has replies without a hash of their request, so that nobody knows what they answer; "
                    "choose another --out, or move the file away"
                )
            self._add(Answer(**record))

    def _add(self, answer: Answer) -> None:
        self._saved[answer.kind, answer.row_id, answer.request, answer.number] = answer

    def ask(
        self, kind: str, endpoint: Endpoint, chats: Sequence[tuple[Example, Sequence[Message]]], samples: int = 1
    ) -> tuple[dict[str, list[Answer]], dict[str, str]]:
        """Return the replies by row id, and the reasons of refusals by row id.

        Sends the requests without a saved reply, and saves each reply when it arrives. Raises openai.APIError if an
        endpoint keeps failing, after saving the replies to requests that were already sent.
        """
        questions = [
            _Question(row, chat, number, request)
            for row, chat in chats
            for request in [_request_hash(endpoint, chat, row.images)]
            for number in range(samples)
        ]
        unanswered = [q for q in questions if (kind, q.row.id, q.request, q.number) not in self._saved]
        refusals = self._send(kind, endpoint, unanswered) if unanswered else {}
        replies: dict[str, list[Answer]] = {}
        for question in questions:
            if question.row.id not in refusals:
                answer = self._saved[kind, question.row.id, question.request, question.number]
                replies.setdefault(question.row.id, []).append(answer)
        return replies, refusals

    def _send(self, kind: str, endpoint: Endpoint, questions: Sequence[_Question]) -> dict[str, str]:
        client = endpoint.client(self._requests)
        refusals: dict[str, str] = {}
        failure: openai.APIError | None = None
        stopped = threading.Event()

        def reply(question: _Question) -> Answer | Refusal | None:
            return None if stopped.is_set() else _reply(kind, endpoint, client, question)

        bar = ProgressBar(kind, len(questions), with_lines=True)
        with JSONLines(self._path) as file, bar, ThreadPoolExecutor(self._requests.workers) as pool:
            try:
                for done, future in enumerate(as_completed([pool.submit(reply, q) for q in questions]), 1):
                    try:
                        answer = future.result()
                    except openai.APIError as error:
                        failure = failure or error
                        stopped.set()
                        continue
                    if isinstance(answer, Refusal):
                        refusals[answer.row_id] = answer.reason
                    elif answer is not None:
                        self._add(answer)
                        file.append(asdict(answer))
                    if failure is None:
                        bar.update(done)
            finally:
                stopped.set()  # on an interrupt, do not wait for queued requests
        if failure is not None:
            raise failure
        return refusals

    def cost(self, kind: str, endpoint: Endpoint) -> dict[str, float]:
        """Return the requests, tokens and price of all replies in this folder, earlier runs included."""
        answers = [a for a in self._saved.values() if a.kind == kind and a.model == endpoint.model]
        tokens_in, tokens_out = sum(a.tokens_in for a in answers), sum(a.tokens_out for a in answers)
        price = (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6
        return {"requests": len(answers), "tokens_in": tokens_in, "tokens_out": tokens_out, "price": price}


def _request_hash(endpoint: Endpoint, chat: Sequence[Message], images: Sequence[bytes]) -> str:
    content = [
        *(endpoint.model, endpoint.max_tokens, endpoint.temperature),
        [[message.role, message.content] for message in chat],
        [hashlib.sha256(image).hexdigest() for image in images],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


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
    """Return OpenAI's messages, with each placeholder replaced by its image."""
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
