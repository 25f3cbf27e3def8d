"""Two rows never have one id, however the ids were written."""

from __future__ import annotations

from typing import Any

import pytest

from prism_megatron.data.dataset import read_pairs, read_rlvr, read_sft


def ids(made: Any, *rows: dict[str, Any]) -> list[str]:
    return [row.id for row in read_rlvr(made.parquet(*rows))]


def test_an_index_that_each_source_counts_from_zero(made: Any) -> None:
    rows = [made.rlvr(data_source=source, extra_info={"index": i}) for source in "ab" for i in (0, 1)]
    assert ids(made, *rows) == ["a/0", "a/1", "b/0", "b/1"]
    assert ids(made, *rows[2:]) == ["b/0", "b/1"]  # whatever other source is with it


@pytest.mark.parametrize("none", [None, "", float("nan")], ids=str)
def test_no_id_is_the_position_in_the_file(made: Any, none: Any) -> None:
    path = made.jsonl(*[made.sft(id=none)] * 2)
    assert [row.id for row in read_sft(path)] == ["data.jsonl/1", "data.jsonl/2"]


def test_a_null_index_is_no_id(made: Any) -> None:
    assert ids(made, *[made.rlvr(extra_info={"index": None, "split": "train"})] * 2) == [
        "data.parquet/0",
        "data.parquet/1",
    ]


def test_repeated_ids_get_a_number_and_the_first_stays(made: Any) -> None:
    rows = [made.rlvr(id=given) for given in ("7", "8", "7", "7#2", "7")]
    assert ids(made, *rows) == ["7", "8", "7#3", "7#2", "7#4"]
    assert ids(made, made.rlvr(id="7")) == ["7"]


def test_ids_repeated_over_files(made: Any) -> None:
    paths = [made.jsonl(made.pair(), name=name) for name in ("one.jsonl", "two.jsonl")]
    assert [pair.id for pair in read_pairs(paths)] == ["p", "p#2"]


def test_zero_is_an_id(made: Any) -> None:
    assert [row.id for row in read_sft(made.jsonl(made.sft(id=0)))] == ["0"]
