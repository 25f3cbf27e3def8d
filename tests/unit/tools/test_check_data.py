"""The report about a data file names what a run would do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.check_data import main


@pytest.fixture
def file(tmp_path: Path, tiny_data: Path) -> Path:
    lines = (tiny_data / "sft.jsonl").read_text().splitlines()[:6]
    rows: list[dict[str, Any]] = [json.loads(line) | {"id": i} for i, line in enumerate(lines)]
    for row in rows:
        row["images"] = [str(tiny_data / image) for image in row["images"]]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(("One?", "1.", "Two?", "2."))]
    rows += [{"conversations": turns}, {"conversations": turns[:1]}, {"conversations": turns[:3]}]
    rows.append({"conversations": [{"from": "human", "value": "much " * 900}, turns[1]]})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_rows_are_counted_by_kind_and_fault(
    file: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    arguments = [str(file), "--hf", str(tiny_checkpoint), "--max-tokens", "512", "--html", str(page)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "10 rows in 1 file(s), 8 can be used",
        "images in a row: 1: 6, none: 2",
        "turns of a row: user: 7, user assistant user: 1",
    ]
    assert printed[3].startswith("pixels of an image (6): 0 %: 6144, 50 %: 6144")
    assert printed[4].startswith("tokens of a row (8): 0 %: ")
    assert printed[5] == "2 of 10 rows cannot be used:"
    assert printed[6].startswith("  2 like: ")
    assert "data.jsonl, line 8: the last turn must be the assistant's" in printed[6]
    assert printed[7] == "1 of 10 rows are too long:"
    assert "data.jsonl, line 10: " in printed[8]
    assert printed[9] == "a run would stop at this file"
    text = page.read_text()
    assert text.count("<h2>") == 8
    assert "[6 image tokens]" in text
    assert "<mark>1.&lt;|im_end|&gt;</mark>" in text, "an earlier answer"
    assert "<mark>2.&lt;|im_end|&gt;</mark>" in text
    assert main([*arguments, "max_bad_fraction=0.2"]) == 0
    assert capsys.readouterr().out.endswith("a run would skip these rows\n")


def test_settings_and_files_that_are_wrong(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "colums=[a=b]"]) == 2
    assert main([str(file.parent / "none.jsonl")]) == 2
    assert main([str(file), "--as", "rlvr"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in printed if line.startswith("error")] == ["error"] * 3
    assert "no such data file" in printed[1]
