"""Select the alignment set and the RLVR set from a pool of prompts (spec 1.2 to 1.4)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prism_megatron.data.dataset import write_prompts
from prism_megatron.data.response import parse_response
from prism_megatron.files import write_atomic
from prism_megatron.reward.answer import is_correct
from prism_megatron.types import IMAGE_PLACEHOLDER, Example, Message
from tools.curate.endpoint import Answer, Answers, Endpoint, Requests

_VERIFY = """\
A colleague described the image and solved the question as follows.

Question: {question}

{response}

Is every statement of the description visible in the image, and does every step of the reasoning follow? \
Reply with the single word yes or no."""


@dataclass(frozen=True)
class Settings:
    """Endpoints and thresholds. ``samples`` are the student's per prompt, ``band`` the pass rates of RLVR prompts."""

    student: Endpoint
    teacher: Endpoint
    verifier: Endpoint | None
    samples: int = 16
    band: tuple[float, float] = (0.2, 0.8)
    requests: Requests = field(default_factory=Requests)

    def endpoints(self) -> dict[str, Endpoint]:
        every = {"student": self.student, "teacher": self.teacher, "verifier": self.verifier}
        return {kind: endpoint for kind, endpoint in every.items() if endpoint is not None}


def curate(pool: Sequence[Example], out: Path, settings: Settings) -> dict[str, Any]:
    """Write both sets and ``report.json``, which is returned. Raises openai.APIError if an endpoint keeps failing.

    A prompt that the student's endpoint refuses has no pass rate and is in neither set.
    """
    out.mkdir(parents=True, exist_ok=True)
    curation = _Curation(Answers(out / "responses.jsonl", settings.requests), settings)
    rates = curation.pass_rates(pool)
    alignment = curation.verified(curation.demonstrated([row for row in pool if rates.get(row.id) == 0]))
    low, high = settings.band
    rlvr = [row for row in pool if low <= rates.get(row.id, -1.0) <= high]
    _write_set(out / "alignment.parquet", [_split(row) for row in alignment])
    _write_set(out / "rlvr.parquet", rlvr)
    report = {
        "pool": len(pool),
        "alignment": len(alignment),
        "rlvr": len(rlvr),
        "alignment_rejects": dict(curation.rejects),
        "rlvr_rejects": {
            "student's endpoint refuses it": len(curation.refusals["student"]),
            "solved too rarely": sum(rate < low for rate in rates.values()),
            "solved too often": sum(rate > high for rate in rates.values()),
        },
        "refusals": curation.refusals,
        "cost": {kind: curation.answers.cost(kind, each) for kind, each in settings.endpoints().items()},
        "pass_rates": rates,
    }
    write_atomic(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


class _Curation:
    """Steps of a selection, with the number of alignment prompts that each rejects and the reasons of refusals."""

    def __init__(self, answers: Answers, settings: Settings) -> None:
        self.answers, self._settings = answers, settings
        self.rejects: Counter[str] = Counter()
        self.refusals: dict[str, Mapping[str, str]] = {}

    def pass_rates(self, pool: Sequence[Example]) -> dict[str, float]:
        """Return the fraction of the student's responses to each prompt that are correct."""
        chats = [(row, row.messages) for row in pool]
        responses = self._ask("student", self._settings.student, chats, self._settings.samples)
        rates = {row.id: pass_rate(row, responses[row.id]) for row in pool if row.id in responses}
        self.rejects["student's endpoint refuses it"] = len(self.refusals["student"])
        self.rejects["student solves it"] = sum(rate > 0 for rate in rates.values())
        return rates

    def demonstrated(self, rows: Sequence[Example]) -> list[Example]:
        """Return the rows with a valid demonstration: their own, or the teacher's if they have none."""
        chats = [(row, row.messages) for row in rows if row.response is None]
        lessons = self._ask("teacher", self._settings.teacher, chats) if chats else {}
        valid = []
        for row in rows:
            answer = lessons[row.id][0] if row.id in lessons else None
            if row.response is None and answer is None:
                self.rejects["teacher's endpoint refuses it"] += 1
                continue
            demonstration = replace(row, response=answer.text) if answer else row
            if fault := demonstration_fault(demonstration, answer is None or answer.finished):
                self.rejects[fault] += 1
            else:
                valid.append(demonstration)
        return valid

    def verified(self, rows: list[Example]) -> list[Example]:
        """Return the rows whose demonstration the verifier accepts; all of them without a verifier."""
        verifier = self._settings.verifier
        if verifier is None or not rows:
            return rows
        chats = [(row, [*row.messages[:-1], _verification(row)]) for row in rows]
        verdicts = self._ask("verifier", verifier, chats)
        judged = [row for row in rows if row.id in verdicts]
        accepted = [row for row in judged if verdicts[row.id][0].text.strip().lower().startswith("yes")]
        self.rejects["verifier's endpoint refuses it"] = len(rows) - len(judged)
        self.rejects["verifier doubts the demonstration"] = len(judged) - len(accepted)
        return accepted

    def _ask(
        self, kind: str, endpoint: Endpoint, chats: Sequence[tuple[Example, Sequence[Message]]], samples: int = 1
    ) -> dict[str, list[Answer]]:
        answers, self.refusals[kind] = self.answers.ask(kind, endpoint, chats, samples)
        return answers


def pass_rate(row: Example, answers: Sequence[Answer]) -> float:
    """Return the fraction of a prompt's responses that are well-formed and correct."""
    assert row.answer is not None
    verdicts = []
    for answer in answers:
        response = parse_response(answer.text) if answer.finished else None
        verdicts.append(response is not None and is_correct(response.answer, row.answer, row.equivalent_answers))
    return sum(verdicts) / len(verdicts)


def demonstration_fault(row: Example, finished: bool = True) -> str | None:
    """Return the fault of a row's demonstration, or None: first of its format, then of its answer (spec 1.2)."""
    assert row.answer is not None
    if not finished:
        return "demonstration cut by the length limit or a filter"
    response = parse_response(row.response or "")
    if response is None:
        return "demonstration outside the grammar"
    if not is_correct(response.answer, row.answer, row.equivalent_answers):
        return "demonstration's answer is wrong"
    return None


def _verification(row: Example) -> Message:
    question = row.messages[-1].content
    images = IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER)
    question = question.replace(IMAGE_PLACEHOLDER, "").strip()
    return Message("user", images + _VERIFY.format(question=question, response=row.response or ""))


def _write_set(path: Path, rows: Sequence[Example]) -> None:
    """Write a set, or remove an earlier one if it is empty."""
    if rows:
        write_prompts(path, rows)
    else:
        path.unlink(missing_ok=True)


def _split(row: Example) -> Example:
    response = parse_response(row.response or "")
    assert response is not None
    return replace(row, teacher_caption=response.caption_block, teacher_reasoning=response.reasoning_block)
