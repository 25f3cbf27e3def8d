"""Whatever stands in a row, a reader returns records or raises one UserError that says where."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from prism_megatron.data.dataset import read_alignment, read_pairs, read_rlvr, read_sft
from prism_megatron.errors import UserError

READERS = {"sft": read_sft, "pair": read_pairs, "rlvr": read_rlvr, "alignment": read_alignment}
JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**30),
    *("", " ", "x", "a.png", ".", "../a.png", "/", "a\0b", "\ud800", "x" * 5000, "http://x/a.png", "data:;base64,!!"),
    *("<image>", "<image><image>", "<video>", "{", "[", "{}", "[]", "[1]", '{"index": [1]}'),
    *([], [None], [0], [""], ["x"], [[]], [{}], [["a.png"]], {}, {"": None}, {"ground_truth": {}}),
    *({"bytes": "x"}, {"bytes": None, "path": None}, {"bytes": 1}, {"path": "a.png"}, {"url": 1}),
    *({"role": "user"}, {"from": 1, "value": 2}, {"role": ["user"], "content": "x"}),
    *({"role": "user", "content": None}, {"role": "user", "content": [None]}),
    *({"role": "user", "content": [{"type": "image", "image": 3}]}, {"role": "user", "content": [{"type": "video"}]}),
)


def mutated(row: Any) -> Iterator[Any]:
    """``row`` with each part of it, however deep, replaced by junk, and each key left out."""
    yield from (copy.deepcopy(junk) for junk in JUNK)
    keys = list(row) if isinstance(row, dict) else list(range(len(row))) if isinstance(row, list) else []
    for key in keys:
        without = copy.copy(row)
        del without[key]
        yield without
        for part in mutated(row[key]):
            changed = copy.copy(row)
            changed[key] = part
            yield changed


def check(read: Any, path: Any) -> None:
    """Read a file: records, or a UserError with a line for each row it quotes."""
    try:
        assert read(path)
    except UserError as fault:
        lines = str(fault).splitlines()
        quoted = lines[1:6] if len(lines) > 1 else lines
        assert all(path.name in line for line in quoted)


@pytest.mark.parametrize("kind", READERS)
def test_json_rows(made: Any, kind: str) -> None:
    valid = getattr(made, kind)()
    for key in ("images", "image"):
        valid |= {key: ["a.png"]} if key in valid else {}
    rows = list(mutated(valid))
    assert len(rows) > 500
    for some in (rows, *([row] for row in rows[::25])):
        check(READERS[kind], made.file("".join(f"{json.dumps(row)}\n" for row in some).encode(), "data.jsonl"))


@pytest.mark.parametrize("kind", READERS)
def test_parquet_rows(made: Any, kind: str) -> None:
    valid = getattr(made, kind)()
    rows = [valid | {key: part} for key, value in valid.items() for part in mutated(value)]
    for row in rows[::6]:
        try:
            made.parquet(row)
        except (pa.ArrowException, ValueError, OverflowError):  # parquet cannot hold it
            continue
        check(READERS[kind], made.folder / "data.parquet")
