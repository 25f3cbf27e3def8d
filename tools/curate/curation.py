"""Select the alignment set and the RLVR set from a pool of prompts (spec 1.2 to 1.4)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai

from prism_megatron.data.dataset import write_prompts
from prism_megatron.data.response import parse_response
from prism_megatron.files import write_atomic
from prism_megatron.reward.answer import is_correct
from prism_megatron.types import IMAGE_PLACEHOLDER, Example, Message
from tools.curate.endpoint import Answer, Answers, Endpoint

_VERIFY = """\
A colleague described the image and solved the question as follows.

Question: {question}

{response}

Is every statement of the description visible in the image, and does every step of the reasoning follow? \
Reply with the single word yes or no."""


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
        return "demonstration cut by the length limit or a filter"
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
    """Write both sets and the report, which is returned. Raises openai.APIError where an endpoint keeps failing.

    A prompt that the student's endpoint refuses has no pass rate and is in neither set.
    """
    out.mkdir(parents=True, exist_ok=True)
    answers = Answers(out / "responses.jsonl")
    asked = [(row, row.messages) for row in pool]
    tries, unasked = answers.ask("student", student, asked, workers, client_of(student), samples)
    rates = {row.id: pass_rate(row, tries[row.id]) for row in pool if row.id in tries}

    rejects: Counter[str] = Counter()
    refusals = {"student": unasked}
    hard = [row for row in pool if rates.get(row.id) == 0]
    rejects["student's endpoint refuses it"] = len(unasked)
    rejects["student solves it"] = len(rates) - len(hard)
    lessons: dict[str, list[Answer]] = {}
    if lacking := [(row, row.messages) for row in hard if row.response is None]:
        lessons, refusals["teacher"] = answers.ask("teacher", teacher, lacking, workers, client_of(teacher))
    sound = []
    for row in hard:
        if row.response is None and row.id not in lessons:
            rejects["teacher's endpoint refuses it"] += 1
            continue
        reply = lessons[row.id][0] if row.response is None else None
        taught = replace(row, response=reply.text) if reply else row
        if fault := demonstration_fault(taught, reply is None or reply.finished):
            rejects[fault] += 1
        else:
            sound.append(taught)
    if verifier is not None and sound:
        shown = [(row, [*row.messages[:-1], _verification(row)]) for row in sound]
        verdicts, refusals["verifier"] = answers.ask("verifier", verifier, shown, workers, client_of(verifier))
        judged = [row for row in sound if row.id in verdicts]
        sound = [row for row in judged if verdicts[row.id][0].text.strip().lower().startswith("yes")]
        rejects["verifier's endpoint refuses it"] = len(shown) - len(judged)
        rejects["verifier doubts the demonstration"] = len(judged) - len(sound)
    band_rows = [row for row in pool if row.id in rates and band[0] <= rates[row.id] <= band[1]]
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
            "student's endpoint refuses it": len(unasked),
            "solved too rarely": sum(rate < band[0] for rate in rates.values()),
            "solved too often": sum(rate > band[1] for rate in rates.values()),
        },
        "refusals": refusals,
        "cost": {
            kind: answers.cost(kind, endpoint)
            for kind, endpoint in (("student", student), ("teacher", teacher), ("verifier", verifier))
            if endpoint is not None
        },
        "pass_rates": rates,
    }
    write_atomic(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
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
