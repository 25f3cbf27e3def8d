"""Turn a pool of prompts into the alignment set and the RLVR set (spec 1.2 to 1.4).

python -m tools.curate pool.parquet --out runs/curated \\
    --student-url http://localhost:8000/v1 --student-model sft --student-samples 16 \\
    --teacher-url https://api.example.com/v1 --teacher-model teacher --verifier-model teacher

The pool is parquet as for RLVR: prompts, images, answers, and demonstrations where it has them. The student answers
each prompt several times. Prompts it never solves, with a demonstration that is in the grammar, has the right answer
and passes an LLM's verification, become ``alignment.parquet``; those it solves sometimes become ``rlvr.parquet``.
Demonstrations the pool lacks are asked of the teacher.

Endpoints speak OpenAI's chat protocol (vLLM's server does); their key is read from the environment variable that
--student-key-variable or --teacher-key-variable names. Every answer is kept in ``responses.jsonl`` as it comes: the
same command goes on where it was stopped. ``report.json`` says what was dropped and why, and what the tokens cost.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import openai

from prism_megatron.data.chat import IMAGE_PLACEHOLDER
from prism_megatron.data.dataset import read_pool, write_atomic, write_prompts
from prism_megatron.data.response import parse_response
from prism_megatron.reward.answer import is_correct
from prism_megatron.types import Example, Message

_VERIFY = """\
A colleague described the image and solved the question as follows.

Question: {question}

{response}

Is every statement of the description visible in the image, and does every step of the reasoning follow? \
Reply with the single word yes or no."""


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
            raise ValueError(f"{self.url} needs a key; set the environment variable {self.key_variable}")
        return openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=retries, timeout=timeout)


@dataclass(frozen=True)
class Answer:
    """One reply, as it is kept: ``kind`` is student, teacher or verifier, ``number`` counts a prompt's replies."""

    kind: str
    model: str
    row_id: str
    number: int
    text: str
    finished: bool
    tokens_in: int
    tokens_out: int


class Answers:
    """Replies so far, kept in a file that only grows: what is in it is not asked (or paid for) again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[tuple[str, str, str, int], Answer] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                answer = Answer(**json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that was being written when it was stopped
            self._kept[answer.kind, answer.model, answer.row_id, answer.number] = answer

    def ask(
        self,
        kind: str,
        endpoint: Endpoint,
        wanted: Iterable[tuple[Example, list[Message], int]],
        workers: int,
        client: Any,
    ) -> None:
        """Ask whatever of ``wanted`` (row, chat, number of the reply) is not there yet."""
        open_ = [w for w in wanted if (kind, endpoint.model, w[0].id, w[2]) not in self._kept]
        with self._path.open("a") as file, ThreadPoolExecutor(workers) as pool:
            if file.tell() and not self._path.read_bytes().endswith(b"\n"):
                file.write("\n")
            for done, answer in enumerate(pool.map(lambda w: _reply(kind, endpoint, client, *w), open_), 1):
                self._kept[answer.kind, answer.model, answer.row_id, answer.number] = answer
                file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                file.flush()
                if done % 100 == 0 or done == len(open_):
                    print(f"{kind} {done}/{len(open_)}", flush=True)

    def of(self, kind: str, endpoint: Endpoint, row: Example, number: int = 0) -> Answer:
        return self._kept[kind, endpoint.model, row.id, number]

    def cost(self, kind: str, endpoint: Endpoint) -> dict[str, float]:
        answers = [a for a in self._kept.values() if a.kind == kind and a.model == endpoint.model]
        tokens_in, tokens_out = sum(a.tokens_in for a in answers), sum(a.tokens_out for a in answers)
        price = (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6
        return {"requests": len(answers), "tokens_in": tokens_in, "tokens_out": tokens_out, "price": price}


def _reply(
    kind: str, endpoint: Endpoint, client: openai.OpenAI, row: Example, chat: list[Message], number: int
) -> Answer:
    completion = client.chat.completions.create(
        model=endpoint.model,
        messages=_chat(chat, row.images),
        max_tokens=endpoint.max_tokens,
        temperature=endpoint.temperature,
    )
    choice, usage = completion.choices[0], completion.usage
    assert usage is not None, "OpenAI's protocol reports usage in every reply that is not streamed"
    finished = choice.finish_reason == "stop"
    text = choice.message.content or ""
    return Answer(kind, endpoint.model, row.id, number, text, finished, usage.prompt_tokens, usage.completion_tokens)


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


def pass_rate(row: Example, answers: Sequence[Answer]) -> float:
    """Part of a prompt's responses that are in the grammar and right."""
    assert row.answer is not None
    verdicts = []
    for answer in answers:
        response = parse_response(answer.text) if answer.finished else None
        verdicts.append(response is not None and is_correct(response.answer, row.answer, row.equivalent_answers))
    return sum(verdicts) / len(verdicts)


def demonstration_fault(row: Example, finished: bool = True) -> str | None:
    """Why a row's demonstration cannot be learned from, or None: its format first, then its answer (spec 1.2)."""
    assert row.answer is not None
    if not finished:
        return "demonstration cut at the length limit"
    response = parse_response(row.response or "")
    if response is None:
        return "demonstration outside the grammar"
    return (
        None if is_correct(response.answer, row.answer, row.equivalent_answers) else "demonstration's answer is wrong"
    )


def curate(
    pool: Sequence[Example],
    out: Path,
    student: Endpoint,
    teacher: Endpoint,
    verifier: Endpoint | None,
    *,
    samples: int,
    band: tuple[float, float],
    workers: int,
    client_of: Callable[[Endpoint], openai.OpenAI],
) -> dict[str, Any]:
    """Write both sets and the report, which is returned. Raises openai.APIError where an endpoint keeps failing."""
    out.mkdir(parents=True, exist_ok=True)
    answers = Answers(out / "responses.jsonl")
    tries = [(row, list(row.messages), number) for row in pool for number in range(samples)]
    answers.ask("student", student, tries, workers, client_of(student))
    rates = {row.id: pass_rate(row, [answers.of("student", student, row, n) for n in range(samples)]) for row in pool}

    rejects: Counter[str] = Counter()
    hard = [row for row in pool if rates[row.id] == 0]
    rejects["student solves it"] = len(pool) - len(hard)
    lacking = [row for row in hard if row.response is None]
    if lacking:
        answers.ask("teacher", teacher, [(row, list(row.messages), 0) for row in lacking], workers, client_of(teacher))
    sound = []
    for row in hard:
        reply = answers.of("teacher", teacher, row) if row.response is None else None
        taught = replace(row, response=reply.text) if reply else row
        if fault := demonstration_fault(taught, reply is None or reply.finished):
            rejects[fault] += 1
        else:
            sound.append(taught)
    if verifier is not None and sound:
        asked = [(row, [*row.messages[:-1], _verification(row)], 0) for row in sound]
        answers.ask("verifier", verifier, asked, workers, client_of(verifier))
        passed = [row for row in sound if answers.of("verifier", verifier, row).text.strip().lower().startswith("yes")]
        rejects["verifier doubts the demonstration"] = len(sound) - len(passed)
        sound = passed
    band_rows = [row for row in pool if band[0] <= rates[row.id] <= band[1]]
    for name, rows in (("alignment", [_split(row) for row in sound]), ("rlvr", band_rows)):
        if rows:
            write_prompts(out / f"{name}.parquet", rows)
        else:
            (out / f"{name}.parquet").unlink(missing_ok=True)
    report: dict[str, Any] = {
        "pool": len(pool),
        "alignment": len(sound),
        "rlvr": len(band_rows),
        "alignment_rejects": dict(rejects),
        "rlvr_rejects": {
            "solved too rarely": sum(rate < band[0] for rate in rates.values()),
            "solved too often": sum(rate > band[1] for rate in rates.values()),
        },
        "cost": {
            kind: answers.cost(kind, endpoint)
            for kind, endpoint in (("student", student), ("teacher", teacher), ("verifier", verifier))
            if endpoint is not None
        },
        "pass_rates": rates,
    }
    write_atomic(out / "report.json", (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    return report


def _verification(row: Example) -> Message:
    question = row.messages[-1].content
    response = row.response or ""
    shown = IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER)
    text = _VERIFY.format(question=question.replace(IMAGE_PLACEHOLDER, "").strip(), response=response)
    return Message("user", shown + text)


def _split(row: Example) -> Example:
    response = parse_response(row.response or "")
    assert response is not None
    return replace(row, teacher_caption=response.caption_block, teacher_reasoning=response.reasoning_block)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    for role in ("student", "teacher"):
        parser.add_argument(f"--{role}-url", required=True)
        parser.add_argument(f"--{role}-model", required=True)
        parser.add_argument(f"--{role}-key-variable", default="OPENAI_API_KEY")
        parser.add_argument(f"--{role}-temperature", type=float, default=1.0)
        parser.add_argument(f"--{role}-price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"))
    parser.add_argument("--verifier-model", help="asked at the teacher's endpoint; without it nothing is verified")
    parser.add_argument("--student-samples", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--band", type=float, nargs=2, default=(0.2, 0.8), metavar=("LOW", "HIGH"))
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--retries", type=int, default=8)
    parser.add_argument("--timeout-seconds", type=float, default=600.0)
    args = parser.parse_args()
    student, teacher = (
        Endpoint(
            getattr(args, f"{role}_url"),
            getattr(args, f"{role}_model"),
            getattr(args, f"{role}_key_variable"),
            args.max_tokens,
            getattr(args, f"{role}_temperature"),
            *getattr(args, f"{role}_price"),
        )
        for role in ("student", "teacher")
    )
    verifier = replace(teacher, model=args.verifier_model, temperature=0.0) if args.verifier_model else None
    try:
        report = curate(
            read_pool(args.pool),
            args.out,
            student,
            teacher,
            verifier,
            samples=args.student_samples,
            band=tuple(args.band),
            workers=args.workers,
            client_of=lambda endpoint: endpoint.client(args.retries, args.timeout_seconds),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except openai.APIError as error:
        print(f"error: {error}; what was answered is kept, the same command goes on from there", file=sys.stderr)
        return 1
    print(
        f"alignment {report['alignment']}, rlvr {report['rlvr']} of {report['pool']}; {args.out}/report.json says why"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
