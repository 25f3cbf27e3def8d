"""Curation against a real vLLM server, which plays student, teacher and verifier."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_alignment, read_pool, read_rlvr, write_prompts
from prism_megatron.types import Example
from tools.curate.curation import Settings, curate, demonstration_fault, pass_rate
from tools.curate.endpoint import Answer, Endpoint, Requests

SAMPLES = 4


@pytest.fixture(scope="module")
def endpoint(speaking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(speaking_checkpoint)),
        *("--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"),
        *("--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield Endpoint(f"http://127.0.0.1:{port}/v1", "tiny", "NO_KEY", 160, 1.0, price_in=1.0, price_out=10.0)
        finally:
            server.terminate()
            server.wait(timeout=300)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=60)
        except OSError:  # refused, reset or timed out; urllib's own errors are among them
            time.sleep(1)
        else:
            return
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def pool(tiny_data: Path) -> list[Example]:
    """Half with their demonstrations, half without; two of the former spoilt, with answers that nobody gives."""
    rows = read_alignment(tiny_data / "alignment.parquet")
    taught = [replace(row, teacher_caption=None, teacher_reasoning=None) for row in rows]
    wrong = replace(taught[0], answer="zebra")
    broken = replace(taught[1], answer="zebra", response="zebra")
    return [wrong, broken, *taught[2:8], *(replace(row, response=None) for row in taught[8:])]


def run(pool: list[Example], out: Path, endpoint: Endpoint, verifier: Endpoint | None) -> dict[str, Any]:
    settings = Settings(endpoint, endpoint, verifier, SAMPLES, requests=Requests(workers=16, retries=2))
    return curate(pool, out, settings)


def saved(out: Path) -> list[Answer]:
    return [Answer(**json.loads(line)) for line in lines_of(out / "responses.jsonl")]


def no_client(*_: object) -> NoReturn:
    raise AssertionError("a request was sent again")


def test_a_pool_becomes_two_sets(
    pool: list[Example],
    endpoint: Endpoint,
    speaking_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = ChatProcessor(speaking_checkpoint)
    report = run(pool, tmp_path, endpoint, None)
    answers = saved(tmp_path)
    for row in pool:
        responses = [a for a in answers if a.kind == "student" and a.row_id == row.id]
        assert len(responses) == SAMPLES
        assert report["pass_rates"][row.id] == pass_rate(row, responses)
    assert len({a.text for a in answers}) > len(pool), "samples differ"

    rates = report["pass_rates"]
    assert rates[pool[0].id] == rates[pool[1].id] == 0
    rejects = report["alignment_rejects"]
    assert rejects["student solves it"] == sum(rate > 0 for rate in rates.values()) > 0
    assert rejects["demonstration's answer is wrong"] >= 1
    assert rejects["demonstration outside the grammar"] >= 1
    assert sum(rejects.values()) + report["alignment"] == len(pool)
    alignment = read_alignment(tmp_path / "alignment.parquet")
    assert len(alignment) == report["alignment"] > 0
    assert all(rates[row.id] == 0 and demonstration_fault(row) is None for row in alignment)
    inside = {row.id for row in pool if 0.2 <= rates[row.id] <= 0.8}
    assert len(inside) == report["rlvr"]
    if inside:
        assert {row.id for row in read_rlvr(tmp_path / "rlvr.parquet")} == inside

    cost = report["cost"]["student"]
    student = [a for a in answers if a.kind == "student"]
    assert cost["requests"] == len(pool) * SAMPLES
    assert cost["price"] == pytest.approx(sum(a.tokens_in + 10 * a.tokens_out for a in student) / 1e6)
    assert all(a.tokens_out > 0 for a in student)
    prompts = dict(zip((row.id for row in pool), processor.encode_prompts(pool), strict=True))
    image_token = processor.input_spec.image_token_id
    assert all(prompt.token_ids.count(image_token) > 0 for prompt in prompts.values())
    assert all(a.tokens_in == len(prompts[a.row_id].token_ids) for a in student), "the very prompt, image and all"

    # Stopped in the middle of a line, it asks for what is missing, and for nothing else.
    path = tmp_path / "responses.jsonl"
    lines = lines_of(path)
    path.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:20])
    again = run(pool, tmp_path, endpoint, None)
    assert len({(a.kind, a.row_id, a.number) for a in complete(path)}) == len(lines)
    with monkeypatch.context() as patched:
        patched.setattr(Endpoint, "client", no_client)
        assert run(pool, tmp_path, endpoint, None) == again

    verified = run(pool, tmp_path, endpoint, replace(endpoint, temperature=0.0))
    doubted = verified["alignment_rejects"]["verifier doubts the demonstration"]
    yes = [a for a in complete(path) if a.kind == "verifier" and a.text.strip().lower().startswith("yes")]
    assert doubted == again["alignment"] - len(yes)
    assert verified["alignment"] == len(yes)
    assert (tmp_path / "alignment.parquet").exists() == bool(yes), "no set of an earlier run is left behind"


def lines_of(path: Path) -> list[str]:
    """Lines of JSON Lines, which may contain characters that ``str.splitlines`` splits at."""
    return path.read_text().removesuffix("\n").split("\n")


def complete(path: Path) -> list[Answer]:
    answers = []
    for line in lines_of(path):
        try:
            answers.append(Answer(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return answers


def test_a_pool_file_needs_no_demonstrations(pool: list[Example], tmp_path: Path) -> None:
    bare = [replace(row, response=None) for row in pool]
    write_prompts(tmp_path / "bare.parquet", bare)
    assert [row.response for row in read_pool(tmp_path / "bare.parquet")] == [None] * len(pool)


def test_a_remote_endpoint_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    remote = Endpoint("https://teacher.example/v1", "m", "SOME_KEY", 1, 1.0)
    with pytest.raises(ValueError, match="needs a key; set the environment variable SOME_KEY"):
        remote.client(Requests(retries=0, timeout_seconds=1.0))
