"""report.html: everything on one page, whatever a model or a question says."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prism_megatron.observe.report import _running_mean, write_report


class Outline(HTMLParser):
    """Tags and text of a page; a page whose tags do not nest fails."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rollout(**changed: object) -> dict[str, object]:
    row: dict[str, object] = {
        "stage": "align", "iteration": 1, "sample_id": "row-1", "question": "How many <b>red</b> ones?",
        "image": "a1", "response": "<script>alert(1)</script>", "caption": None, "think": None,
        "answer": None, "ground_truth": "3", "correct": False, "format_valid": False, "perception_score": None,
        "reasoning_score": None, "advantage": -1.5,
    }  # fmt: skip
    return row | changed


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_report_of_a_run(tmp_path: Path) -> None:
    align = tmp_path / "align"
    gaps = [{"iteration": i, "perception_gap": 0.1 * i, "reasoning_gap": -0.1 * i, "seconds_train": 2} for i in (1, 2)]
    write_lines(align / "metrics.jsonl", gaps)
    good = rollout(caption="- top: a", think="b", answer="3", correct=True, format_valid=True, perception_score=1.25)
    others = [good | {"reasoning_score": -0.5, "advantage": 0.75}, rollout(image=None), rollout(image="lost")]
    write_lines(align / "rollouts.jsonl", [rollout(), *others])
    (align / "pictures").mkdir()
    (align / "pictures" / "a1").write_bytes(b"hi")
    result = {
        "stage": "align", "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "format_valid": 1.0, "response_tokens": 50.0,
        "num_questions": 512, "caption_recall": 0.9, "caption_recall_stderr": 0.01,
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps([result]))

    page = Outline(write_report(tmp_path).read_text())
    text = "".join(page.text)
    (align / "finished.json").write_text('{"config": ""}')
    assert "not finished" not in write_report(tmp_path).read_text()
    assert page.tags.count("svg") == 1, "one chart: the two gaps"
    assert "perception gap" in text
    assert "train 4 s" in text
    assert "2 iterations · not finished" in text
    assert "40.0 % – 60.0 %" in text
    assert "outside the grammar" in text
    assert "perception 1.25, reasoning -0.50" in text
    assert "<script>alert(1)</script>" in text, "shown as text"
    assert "script" not in page.tags
    assert [link for link in page.links if link.startswith("data:")] == 2 * ["data:image/png;base64,aGk="]
    assert all(link.startswith(("data:", "#")) for link in page.links), "nothing is loaded from elsewhere"


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = tmp_path / "sft"
    write_lines(stage / "metrics.jsonl", [{"iteration": 1, "loss": 2.0}])
    with (stage / "metrics.jsonl").open("ab") as file:
        file.write(b'[]\n{"loss": 1}\n\xff\n{"iteration": 2, "loss": 1.0}\n{"iter')
    for name in ("finished.json", "versions.json"):
        (stage / name).write_text("{")
    assert "2 iterations" in "".join(Outline(write_report(tmp_path).read_text()).text)
    said = capsys.readouterr().out
    assert "metrics.jsonl: skipped 4 lines" in said
    assert "finished.json is damaged (not a JSON object)" in said


def test_running_mean() -> None:
    assert _running_mean([1.0, 3.0, 5.0, 1.0], 2) == [1.0, 2.0, 4.0, 3.0]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no stage with a metrics.jsonl; give a run"):
        write_report(tmp_path)


def test_a_stage_that_ran_alone_has_a_report(tmp_path: Path) -> None:
    stage = tmp_path / "user"
    stage.mkdir()
    (stage / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "time": 0.0, "loss": 2.0}) + "\n")
    page = write_report(stage)
    assert page == stage / "report.html"
    assert "user" in "".join(Outline(page.read_text()).text)
