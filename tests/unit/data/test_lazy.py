"""Rows are indexed once and read when they are asked for; what cannot be used is skipped the same way everywhere."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from prism_megatron.data import index as indexing
from prism_megatron.data.dataset import read_alignment, read_rlvr, read_sft
from prism_megatron.data.fields import Images
from prism_megatron.data.lazy import positions_by_id
from prism_megatron.data.row_files import json_locations
from prism_megatron.data.rows import ReadOptions
from prism_megatron.errors import UserError

CUT_PNG = b"\x89PNG\r\n\x1a\n cut"


def options(made: Any, **changes: Any) -> ReadOptions:
    return ReadOptions(**{"cache": made.folder / "cache", "skip_bad_rows": True, "max_bad_fraction": 0.5} | changes)


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_row_is_read_when_it_is_asked_for(made: Any) -> None:
    rows = read_sft(made.jsonl(*[made.sft(id=i) for i in range(20)]), options(made))
    with patch.object(Images, "of_row", autospec=True, side_effect=Images.of_row) as read:
        assert len(rows) == 20
        assert [row.id for row in rows[4:12:4]] == ["4", "8"]
        assert read.call_count == 2
        assert rows[-1].id == "19"
        assert len(rows[:3][1:]) == 2
        assert read.call_count == 3
    with pytest.raises(IndexError):
        rows[20]


def test_rows_of_json_and_parquet_equal_those_read_one_by_one(made: Any) -> None:
    lines = [made.sft(id=str(i), system="ä\u2028" * i) for i in range(9)]
    for path in (
        made.jsonl(*lines),
        made.file(json.dumps(lines, indent=1).encode(), "list.json"),
        made.parquet(*lines, row_group_size=4),
    ):
        rows = read_sft(path, options(made))
        assert [(row.id, row.messages[0].content) for row in rows] == [
            *[("0", "<image>How many?")],
            *[(str(i), "ä\u2028" * i) for i in range(1, 9)],
        ]
        assert rows[3].images == (made.picture(),)


@pytest.mark.parametrize(
    "element", ['{"a": "]},[{"}', '"\\\\"', '"\\"]"', "1.5e3", "null", "[[1, {}], []]", '{"ä": "\\u005d,"}', " [ ] "]
)
def test_elements_of_a_json_list(made: Any, element: str) -> None:
    text = f'\ufeff [ {element},{element}\n, {{"b": [1, 2]}} ,{element}]\n'
    path = made.file(text.encode(), "x.json")
    content = path.read_bytes()
    found = [json.loads(content[row["start"] : row["start"] + row["length"]]) for row in json_locations(path)]
    assert found == json.loads(text.removeprefix("\ufeff"))


@pytest.mark.parametrize("text", ["[{}, {}", '[{"a": 1}] x', '["a]', "[1}, 2]", "[[1]", "[{}]]"])
def test_a_damaged_json_list_is_named(made: Any, text: str) -> None:
    with pytest.raises(UserError, match=r"x\.json"):
        read_sft(made.file(text.encode(), "x.json"))


def test_positions_of_ids_without_reading(made: Any) -> None:
    rows = read_rlvr(made.parquet(*[made.rlvr(id=i % 5) for i in range(10)]), options(made))[2:]
    with patch.object(Images, "of_row", side_effect=AssertionError):
        assert positions_by_id(rows, ["3", "1#2", "0"]) == {"3": 1, "1#2": 4}
    assert positions_by_id(list(rows), ["3", "1#2", "0"]) == {"3": 1, "1#2": 4}


def test_rows_go_to_another_process(made: Any) -> None:
    rows = read_rlvr(made.parquet(*[made.rlvr(id=i) for i in range(4)]), options(made))
    assert rows[2].id == "2"
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


# The index ------------------------------------------------------------------------------------------------------------


def test_an_index_is_built_once_for_a_content_and_a_reader(made: Any) -> None:
    path = made.parquet(*[made.alignment(id=i) for i in range(3)])
    with patch.object(indexing, "build_index", wraps=indexing.build_index) as build:
        for count in (1, 1):
            assert len(read_rlvr(path, options(made))) == 3
            assert build.call_count == count
        assert len(read_alignment(path, options(made))) == 3
        assert build.call_count == 2
        made.parquet(*[made.alignment(id=i) for i in range(4)])
        assert len(read_rlvr(path, options(made))) == 4
        assert build.call_count == 3


def build_and_count(path: Path, cache: Path, results: Any) -> None:
    with patch.object(indexing, "build_index", wraps=indexing.build_index) as build:
        rows = read_sft(path, ReadOptions(cache=cache))
    results.put((len(rows), build.call_count))


def test_processes_of_a_node_wait_for_the_one_that_builds(made: Any) -> None:
    path = made.jsonl(*[made.sft(id=i) for i in range(500)])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=build_and_count, args=(path, made.folder / "c", results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(found) == [(500, 0), (500, 0), (500, 0), (500, 1)]
    assert {entry.suffix for entry in (made.folder / "c").iterdir()} == {"", ".lock"}


def test_an_index_of_many_processes_is_that_of_one(made: Any) -> None:
    bad = [made.sft(id=i % 50, system=7) if i % 40 == 3 else made.sft(id=i % 50) for i in range(150)]
    files = [made.jsonl(*bad, name="a.jsonl"), made.parquet(*[made.sft(id=i) for i in range(60)])]
    alone = read_sft(files, options(made, cache=made.folder / "alone")).row_index
    with patch.object(indexing, "_ROWS_PER_TASK", 16), patch.object(indexing, "_ROWS_PER_PROCESS", 100):
        together = read_sft(files, options(made, cache=made.folder / "together")).row_index
    assert (alone.entries == together.entries).all()
    assert [alone.ids[i] for i in range(210)] == [together.ids[i] for i in range(210)]
    assert (alone.faults, alone.roles) == (together.faults, together.roles)
    assert np.array_equal(alone.image_sizes, together.image_sizes)
    assert sorted(alone.faults) == [3, 43, 83, 123]


def test_a_build_that_fails_leaves_nothing(made: Any) -> None:
    path = made.jsonl(made.sft())
    with patch.object(indexing, "_write_index", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        read_sft(path, options(made))
    assert [entry.suffix for entry in (made.folder / "cache").iterdir()] == [".lock"]
    assert len(read_sft(path, options(made))) == 1


# Rows that cannot be used ---------------------------------------------------------------------------------------------


def test_bad_rows_are_left_out_and_listed(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_sft(made.jsonl(*[made.sft(id=i, system=7 if i in (2, 5) else "s") for i in range(9)]), options(made))
    assert [row.id for row in rows] == ["0", "1", "3", "4", "6", "7", "8"]
    report = made.folder / "skipped_rows.jsonl"
    rows.report_skipped(report, known=True, new=True)
    listed = [json.loads(line) for line in report.read_text().splitlines()]
    assert [entry["source"].rpartition(", ")[2] for entry in listed] == ["line 3", "line 6"]
    assert all("system must be text, got 7" in entry["fault"] for entry in listed)
    assert capsys.readouterr().out == f"skipped 2 of 9 rows, listed in {report}\n"


@pytest.mark.parametrize(("limit", "skip"), [(0.3, True), (1.0, False)])
def test_more_bad_rows_than_allowed_end_the_run(made: Any, limit: float, skip: bool) -> None:
    path = made.jsonl(*[made.sft(system=7 if i in (2, 5, 6) else "s") for i in range(9)])
    assert len(read_sft(path, options(made, max_bad_fraction=1 / 3))) == 6
    with pytest.raises(UserError, match=r"^3 of 9 rows cannot be used"):
        read_sft(path, options(made, max_bad_fraction=limit, skip_bad_rows=skip))


def test_a_data_set_of_bad_rows_is_refused(made: Any) -> None:
    with pytest.raises(UserError, match="2 of 2 rows cannot be used"):
        read_sft(made.jsonl(made.sft(system=7), made.sft(system=7)), options(made, max_bad_fraction=1.0))


def test_a_picture_found_bad_when_it_is_used_is_skipped_alike_everywhere(
    made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made.file(CUT_PNG, "cut.png")
    path = made.jsonl(*[made.sft(id=i, images=["cut.png" if i in (3, 4, 9) else "a.png"]) for i in range(10)])
    unchecked = options(made, check_images_max_rows=0)
    rows, same = read_sft(path, unchecked), read_sft(path, unchecked)
    report = made.folder / "skipped_rows.jsonl"
    rows.report_skipped(report, known=True, new=True)
    assert len(rows) == 10
    assert [rows[i].id for i in (3, 9, 4, 3)] == ["5", "0", "5", "5"]
    assert [row.id for row in same] == ["0", "1", "2", "5", "5", "5", "6", "7", "8", "0"]
    listed = [json.loads(line)["source"].rpartition(" ")[2] for line in report.read_text().splitlines()]
    assert listed == ["4", "5", "10"]
    assert capsys.readouterr().out.count("skipped a row: ") == 6
    with pytest.raises(UserError, match=r"line 4, image cut\.png: not a readable image"):
        read_sft(path, options(made, check_images_max_rows=0, skip_bad_rows=False))[3]
    with pytest.raises(UserError, match="3 of 10 rows cannot be used"):
        list(read_sft(path, options(made, check_images_max_rows=0, max_bad_fraction=0.25)))


def test_a_missing_picture_is_known_before_it_is_used(made: Any) -> None:
    with pytest.raises(UserError, match=r"line 2: image .*b\.png does not exist"):
        read_sft(made.jsonl(made.sft(), made.sft(images=["b.png"])), ReadOptions(check_images_max_rows=0))


def test_a_check_is_made_of_rows_whose_pictures_were_not_looked_at(made: Any) -> None:
    def refuse(row: Any) -> None:
        if row.id == "1":
            raise UserError(f"{row.source}: too long")

    path = made.jsonl(*[made.sft(id=i) for i in range(3)])
    for known in (True, False):
        rows = read_sft(path, options(made, check_images_max_rows=10 * known))
        rows.check_when_read(refuse)
        assert [row.id for row in rows[:2]] == (["0", "1"] if known else ["0", "0"])
