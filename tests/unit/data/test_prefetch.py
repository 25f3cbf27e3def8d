"""Rows encoded ahead in worker processes are those encoded when they are due."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from prism_megatron.data.dataset import read_sft
from prism_megatron.data.lazy import read_row
from prism_megatron.data.prefetch import prefetch
from prism_megatron.data.rows import ReadOptions
from prism_megatron.errors import UserError
from prism_megatron.types import EncodedPrompt, Visual

CUT_PNG = b"\x89PNG\r\n\x1a\n cut"


def rows_of(made: Any, bad: tuple[int, ...] = (), limit: float = 0.5) -> Any:
    made.file(CUT_PNG, "cut.png")
    lines = [made.sft(id=i, images=["cut.png" if i in bad else "a.png"]) for i in range(12)]
    unchecked = ReadOptions(made.folder / "cache", True, limit, check_images_max_rows=0)
    return read_sft(made.jsonl(*lines), unchecked)


def prompts(rows: Any) -> Any:
    """Two rows an iteration; both show one image, a tensor of the iteration's number, and one has another."""

    def make(iteration: int, trace: Any) -> list[tuple[str, EncodedPrompt]]:
        shared, own = (Visual(torch.full((rows_, 6), float(iteration)), (1, rows_, 1)) for rows_ in (4, 8))
        read = [read_row(rows, (2 * iteration + i) % len(rows), trace) for i in range(2)]
        return [(read[0].id, EncodedPrompt((1, 2), (shared,))), (read[1].id, EncodedPrompt((3,), (shared, own)))]

    return make


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order_and_whole(made: Any, workers: int) -> None:
    rows = rows_of(made)
    before = torch.random.get_rng_state()
    found = list(prefetch(prompts(rows), rows, range(2, 9), workers))
    assert torch.equal(torch.random.get_rng_state(), before), "the trainer's random numbers are not used"
    assert [row_id for item in found for row_id, _ in item] == [str(i % 12) for i in range(4, 18)]
    for iteration, ((_, first), (_, second)) in enumerate(found, start=2):
        assert (first.token_ids, second.token_ids) == ((1, 2), (3,))
        assert second.visuals[0] is first.visuals[0], "an image that two rows show is one"
        for visual, count in zip(second.visuals, (4, 8), strict=True):
            assert torch.equal(visual.patches, torch.full((count, 6), float(iteration)))


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_skipped_in_workers_are_reported_once(made: Any, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(made, bad=(3, 8))
    report = made.folder / "skipped_rows.jsonl"
    rows.report_skipped(report, known=True, new=True)
    found = list(prefetch(prompts(rows), rows, range(18), workers))
    assert [row_id for item in found for row_id, _ in item] == ["0", "1", "2", "4", *"4567", "9", "9", "10", "11"] * 3
    listed = sorted(json.loads(line)["source"].rpartition(" ")[2] for line in report.read_text().splitlines())
    assert listed == ["4", "9"]
    assert capfd.readouterr().out.count("skipped a row") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_of_the_user_is_one_line(made: Any, workers: int) -> None:
    rows = rows_of(made, bad=(5,), limit=0.0)
    with pytest.raises(UserError, match=r"^[^\n]*line 6, image cut\.png: not a readable image[^\n]*$"):
        list(prefetch(prompts(rows), rows, range(6), workers))


def test_a_worker_that_dies_names_its_row(made: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(made)
    make = prompts(rows)

    def dies(iteration: int, trace: Any) -> Any:
        found = make(iteration, trace)
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    with pytest.raises(BrokenProcessPool):
        list(prefetch(dies, rows, range(6), 1))
    assert capfd.readouterr().err.endswith("data.jsonl, line 8\n")


def test_a_bug_in_a_worker_keeps_its_traceback(made: Any) -> None:
    def wrong(iteration: int, trace: Any) -> int:
        return 1 // iteration

    with pytest.raises(ZeroDivisionError) as caught:
        list(prefetch(wrong, rows_of(made), range(1), 1))
    assert "in wrong" in str(caught.value.__cause__)
