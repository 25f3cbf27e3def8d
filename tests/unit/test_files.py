"""Files that an interrupted process leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_megatron.files import JSONLines, directory_written_atomically, read_json_lines


def append(path: Path, *values: Any) -> None:
    with JSONLines(path, durable=True) as file:
        for value in values:
            file.append(value)


@pytest.mark.parametrize("rest", [b'{"n": ', b'{"n": "\xff', b"[1, 2", b"\x00"])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, rest: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    append(path, {"n": 1})
    with path.open("ab") as file:
        file.write(rest)
    append(path, {"n": 2})
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'
    assert list(read_json_lines(path)) == [{"n": 1}, {"n": 2}]
    assert capsys.readouterr().out == ""


def test_a_complete_last_line_without_an_end_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}')
    append(path, {"n": 3})
    assert [value["n"] for value in read_json_lines(path)] == [1, 2, 3]


def test_any_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    texts = ["a\nb", "a\u2028b\u2029\u0085c", "\ud800", "日本語", "\x00"]
    append(path, *texts)
    assert path.read_bytes().count(b"\n") == len(texts)
    assert list(read_json_lines(path)) == texts


def test_other_lines_are_skipped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\nnot JSON\n[7]\n\xff\xfe\n{"n": 2}\n')
    assert list(read_json_lines(path, lambda value: isinstance(value, dict))) == [{"n": 1}, {"n": 2}]
    assert f"{path}: skipped 3 lines that are damaged or not of this format" in capsys.readouterr().out
    assert list(read_json_lines(tmp_path / "missing.jsonl")) == []


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_directory_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "a" / "final"
    for number in (1, 2):
        with directory_written_atomically(final) as partial:
            assert names(partial) == set()
            (partial / str(number)).touch()
            assert number == 1 or names(final) == {"1"}
    assert names(final) == {"2"}
    assert names(final.parent) == {"final"}


def test_an_error_leaves_the_old_directory_and_the_unfinished_one(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()

    def write() -> None:
        with directory_written_atomically(final) as partial:
            (partial / "1").touch()
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write()
    assert names(final) == set()
    with directory_written_atomically(final, resume=True) as partial:
        assert names(partial) == {"1"}
        (partial / "2").touch()
    assert names(final) == {"1", "2"}
