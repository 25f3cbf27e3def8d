"""Curation with endpoints that refuse, fail for a moment, or break: a local server does so on request."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from prism_megatron.types import Example, Message
from tools.curate.curation import Settings, curate
from tools.curate.endpoint import Endpoint, Requests

RIGHT = "<caption>a</caption><think>b</think><answer>4</answer>"
TOO_LONG = "This model's maximum context length is 512 tokens"


@dataclass
class Server:
    """``answer`` gives status and text for a model's name and the question; every request is counted."""

    answer: Callable[[str, str], tuple[int, str]]
    url: str = ""
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    def endpoint(self, model: str, **changed: Any) -> Endpoint:
        return Endpoint(self.url, model, "NO_KEY", **({"max_tokens": 16, "temperature": 1.0} | changed))

    def asked_of(self, model: str) -> int:
        return sum(count for (asked, _), count in self.asked.items() if asked == model)


@pytest.fixture
def server() -> Iterator[Server]:
    with Served() as server:
        yield server


class Served:
    def __enter__(self) -> Server:
        server = Server(well)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"][-1]["text"]
                server.asked[body["model"], question] += 1
                status, text = server.answer(body["model"], question)
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
                reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "usage": usage}
                content = reply | {"choices": [choice]} if status == 200 else {"error": {"message": text}}
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: what is asked is counted."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()
        return server

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def well(model: str, question: str) -> tuple[int, str]:
    """The student is wrong, the teacher right, the verifier content."""
    return 200, {"student": "wrong", "teacher": RIGHT, "verifier": "Yes."}[model]


def rows(count: int, **changed: Any) -> list[Example]:
    row = Example("", (), (), "here", answer="4", data_source="test")
    return [replace(row, id=f"row{n}", messages=(Message("user", f"q{n}"),), **changed) for n in range(count)]


def run(server: Server, pool: list[Example], out: Path, workers: int = 4, **changed: Endpoint) -> dict[str, Any]:
    roles = {role: changed.get(role, server.endpoint(role)) for role in ("student", "teacher", "verifier")}
    settings = Settings(**roles, samples=2, requests=Requests(workers=workers, retries=3, timeout_seconds=300.0))
    return curate(pool, out, settings)


def saved(out: Path) -> list[dict[str, Any]]:
    path = out / "responses.jsonl"
    return [json.loads(line) for line in path.read_text().strip("\n").split("\n")] if path.exists() else []


def test_a_refusal_rejects_its_row_and_nothing_else(server: Server, tmp_path: Path) -> None:
    def answer(model: str, question: str) -> tuple[int, str]:
        refused = {"student": (400, "q0"), "teacher": (413, "q1"), "verifier": (422, "Question: q2\n")}
        status, mark = refused[model]
        return (status, TOO_LONG) if mark in question else well(model, question)

    server.answer = answer
    report = run(server, rows(5), tmp_path)
    assert report["alignment"] == 2
    assert report["alignment_rejects"] == {
        "student's endpoint refuses it": 1,
        "teacher's endpoint refuses it": 1,
        "verifier's endpoint refuses it": 1,
        "student solves it": 0,
        "verifier doubts the demonstration": 0,
    }
    assert report["rlvr_rejects"] == {
        "student's endpoint refuses it": 1,
        "solved too rarely": 4,
        "solved too often": 0,
    }
    assert {kind: list(reasons) for kind, reasons in report["refusals"].items()} == {
        "student": ["row0"],
        "teacher": ["row1"],
        "verifier": ["row2"],
    }
    assert all(TOO_LONG in reason for reasons in report["refusals"].values() for reason in reasons.values())
    assert "row0" not in report["pass_rates"]
    assert server.asked["student", "q0"] == 2, "two samples, neither of them asked again"
    assert server.asked["teacher", "q1"] == 1
    assert len(saved(tmp_path)) == 4 * 2 + 3 + 2

    # Again: what was answered is there, what was refused may be answered now.
    server.asked.clear()
    server.answer = well
    assert run(server, rows(5), tmp_path)["alignment"] == 5
    assert server.asked_of("student") == 2
    assert server.asked_of("teacher") == server.asked_of("verifier") - 1 == 2


@pytest.mark.parametrize("status", [408, 429, 503])
def test_what_may_pass_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.answer = lambda model, question: (
        well(model, question) if server.asked[model, question] > 1 else (status, "later")
    )
    report = run(server, rows(1), tmp_path, workers=1)
    assert report["alignment"] == 1
    assert report["refusals"] == {"student": {}, "teacher": {}, "verifier": {}}
    assert server.asked["student", "q0"] == 3, "the first sample twice"


def test_each_reply_is_written_when_it_comes(server: Server, tmp_path: Path) -> None:
    """The first row's reply waits until the second one's is on the disk."""

    def answer(model: str, question: str) -> tuple[int, str]:
        deadline = time.monotonic() + 300
        while (model, question) == ("student", "q0") and time.monotonic() < deadline:
            if any(reply["row_id"] == "row1" for reply in saved(tmp_path)):
                return well(model, question)
            time.sleep(0.01)
        return well(model, question) if question != "q0" or model != "student" else (401, "row1 was not written")

    server.answer = answer
    assert run(server, rows(2), tmp_path)["alignment"] == 2


def test_a_fault_of_every_request_stops_and_keeps_what_was_paid(server: Server, tmp_path: Path) -> None:
    server.answer = lambda model, question: (401, "wrong key") if question == "q1" else well(model, question)
    with pytest.raises(openai.AuthenticationError, match="wrong key"):
        run(server, rows(50), tmp_path, workers=1)
    assert len(saved(tmp_path)) == 2, "both samples of the first row"
    assert server.asked_of("student") <= 4, "what was still queued is not asked"
    server.answer = well
    assert run(server, rows(50), tmp_path)["alignment"] == 50


def test_another_question_is_asked_anew(server: Server, tmp_path: Path) -> None:
    run(server, rows(1), tmp_path)
    before = Counter({"student": 2, "teacher": 1, "verifier": 1})

    def asked_now() -> Counter[str]:
        return Counter({model: server.asked_of(model) for model in before}) - before

    with Served() as moved:
        run(moved, rows(1), tmp_path)
        assert not moved.asked, "the same model at another address has answered already"
    for role, changed in (("student", {"temperature": 0.5}), ("teacher", {"max_tokens": 8})):
        run(server, rows(1), tmp_path, **{role: server.endpoint(role, **changed)})
        assert asked_now() == Counter({role: before[role]})
        before.update(asked_now())
    other = replace(rows(1)[0], images=(b"an image",))
    run(server, [other], tmp_path)
    assert asked_now() == Counter(student=2, teacher=1, verifier=1)


def test_a_verdict_belongs_to_the_demonstration_it_judged(server: Server, tmp_path: Path) -> None:
    def answer(model: str, question: str) -> tuple[int, str]:
        return (200, "no") if model == "verifier" and "a cat" in question else well(model, question)

    server.answer = answer
    assert run(server, rows(1, response=RIGHT), tmp_path)["alignment"] == 1
    report = run(server, rows(1, response=RIGHT.replace(">a<", ">a cat<")), tmp_path)
    assert report["alignment"] == 0
    assert report["alignment_rejects"]["verifier doubts the demonstration"] == 1
    assert report["cost"]["verifier"]["requests"] == 2, "both were paid for"


def test_replies_to_unknown_questions_are_not_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text('{"kind": "student", "text": "4"}\n')
    with pytest.raises(ValueError, match=r"responses.jsonl has replies without a hash.*another --out"):
        run(server, rows(1), tmp_path)
