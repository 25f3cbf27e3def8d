"""Files of rows: encodings and line ends, damaged and unusual parquet, many files, several bad rows."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_megatron.data.dataset import (
    check_rlvr,
    read_alignment,
    read_pairs,
    read_rlvr,
    read_sft,
    write_pairs,
    write_prompts,
)
from prism_megatron.errors import UserError

LINE_SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def sft_text(made: Any) -> str:
    return json.dumps(made.sft(system="Sei genau: ä"), ensure_ascii=False)


# JSON Lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", LINE_SEPARATORS, ids=ascii)
def test_only_a_newline_ends_a_line(made: Any, separator: str) -> None:
    text = f"a{separator}b"
    line = json.dumps(made.sft(system=text), ensure_ascii=separator < " ")
    (row,) = read_sft(made.file(f"{line}\n".encode(), "data.jsonl"))
    assert row.messages[0].content == text


def test_written_pairs_with_line_separators_are_read_again(made: Any) -> None:
    (pair,) = read_pairs(made.jsonl(made.pair()))
    pair = replace(pair, student_caption=f"<caption>a{LINE_SEPARATORS}b</caption>")
    write_pairs(made.folder / "again.jsonl", [pair, pair])
    again = read_pairs(made.folder / "again.jsonl")
    assert [row.student_caption for row in again] == [pair.student_caption] * 2


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff{row}\n{row}\n",
        "\ufeff[{row}, {row}]",
        "{row}\r\n\r\n  \r\n{row}",
        " \n\t[\n{row},\n{row}\n]\n",
    ],
    ids=["byte order mark", "byte order mark and list", "CRLF and blank lines", "list"],
)
def test_ordinary_ways_to_write_json(made: Any, content: str) -> None:
    assert len(read_sft(made.file(content.replace("{row}", sft_text(made)).encode(), "data.json"))) == 2


def test_constants_that_only_python_writes_in_an_unused_key(made: Any) -> None:
    assert read_sft(made.file(json.dumps(made.sft(score=float("nan"))).encode(), "data.jsonl"))


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: text.encode("utf-16"), "UTF-16"),
        (lambda text: text.encode("utf-16-le"), "zero bytes"),
        (lambda text: text.encode("utf-32"), "UTF-16|zero bytes"),
        (lambda text: text.encode("latin-1"), r"line 1: not UTF-8 .*0xe4.*convert the file"),
        (lambda text: gzip.compress(text.encode()), "gzip"),
        (lambda text: text.encode()[:40], "line 1: not JSON"),
        (lambda text: b"[" * 100_000, "nested too deeply"),
        (lambda text: b'{"id": ' + b"1" * 5000 + b"}", "line 1: not JSON|digits"),
        (lambda text: b"\n \n", "empty data set"),
        (lambda text: b"[]", "empty data set"),
        (lambda text: b'"text"\n', "a row is a JSON object, got str"),
    ],
)
def test_other_encodings_and_damaged_text_are_named(made: Any, encode: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_sft(made.file(encode(sft_text(made)), "data.jsonl"))


def test_several_bad_rows_are_counted_and_the_first_quoted(made: Any) -> None:
    rows = [made.sft(system=7) if i % 10 == 3 else made.sft() for i in range(80)]
    path = made.jsonl(*rows)
    path.write_bytes(path.read_bytes() + b"{cut")
    with pytest.raises(UserError) as caught:
        read_sft(path)
    first, *lines = str(caught.value).splitlines()
    assert first == "9 of 81 rows cannot be used, correct or drop them:"
    assert [line.partition(":")[0].split()[-1] for line in lines[:-1]] == ["4", "14", "24", "34", "44"]
    assert lines[-1].strip() == "... and 4 more"


# Many files -----------------------------------------------------------------------------------------------------------


def test_a_folder_a_pattern_a_list_and_names_with_commas(made: Any) -> None:
    one, two = made.jsonl(made.sft(), name="b.jsonl"), made.jsonl(made.sft(), made.sft(), name="a.jsonl")
    for data in (made.folder, str(made.folder), f"{made.folder}/*.jsonl", [two, one], f"{two}, {one}"):
        assert [row.source.rpartition("/")[2] for row in read_sft(data)] == [
            "a.jsonl, line 1",
            "a.jsonl, line 2",
            "b.jsonl, line 1",
        ]
    with_comma = made.jsonl(made.sft(), name="c,d.jsonl")
    assert len(read_sft(with_comma)) == 1


def test_shards_of_parquet(made: Any) -> None:
    for number in range(3):
        made.parquet(made.rlvr(extra_info={"index": number}), name=f"train-{number}.parquet")
    assert [row.id for row in read_rlvr(made.folder)] == ["mm_gad/0", "mm_gad/1", "mm_gad/2"]
    check_rlvr(made.folder, 3)
    with pytest.raises(UserError, match="has 3 rows, and 4 are asked for"):
        check_rlvr(made.folder, 4)


def test_what_names_no_file(made: Any) -> None:
    with pytest.raises(UserError, match=r"no \.jsonl, \.json or \.parquet file"):
        read_sft(made.folder)
    with pytest.raises(UserError, match="no such data file"):
        read_sft(f"{made.folder}/*.jsonl")
    with pytest.raises(UserError, match="no data file is named"):
        read_sft([])
    made.jsonl(made.sft()), made.parquet(made.rlvr())
    with pytest.raises(UserError, match=r"both JSON and parquet files; name the file, or a pattern"):
        read_sft(made.folder)


def test_links_to_data_and_pictures_and_names_with_spaces(made: Any) -> None:
    real = made.folder / "my data"
    made.file(json.dumps(made.sft(images=["ein Bild.png"])).encode(), "my data/set one.jsonl")
    made.file(made.picture(), "store/x")
    os.symlink(made.folder / "store" / "x", real / "ein Bild.png")
    os.symlink(real, made.folder / "link")
    assert len(read_sft(made.folder / "link" / "set one.jsonl")) == 1


# Parquet --------------------------------------------------------------------------------------------------------------


def test_nested_columns_as_json_text(made: Any) -> None:
    plain = made.rlvr()
    texts = {key: json.dumps(plain[key]) for key in ("prompt", "reward_model", "extra_info")}
    (row,) = read_rlvr(made.parquet(made.rlvr(**texts)))
    (same,) = read_rlvr(made.parquet(plain))
    assert row == same


def test_large_dictionary_and_view_types(made: Any) -> None:
    table = pa.Table.from_pylist([made.alignment()])
    text, turn = pa.large_string(), [("role", pa.large_string()), ("content", pa.string_view())]
    changed = {
        "data_source": table["data_source"].dictionary_encode(),
        "answer": table["answer"].cast(text),
        "prompt": table["prompt"].cast(pa.large_list(pa.struct(turn))),
        "images": table["images"].cast(pa.large_list(pa.struct([("bytes", pa.large_binary()), ("path", text)]))),
    }
    for name, column in changed.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, made.folder / "other.parquet", compression="zstd")
    assert len(read_alignment(made.folder / "other.parquet")) == 1


def test_row_groups_are_read_in_parts(made: Any) -> None:
    path = made.parquet(*[made.rlvr(id=str(i)) for i in range(200)], row_group_size=1000)
    assert [row.id for row in read_rlvr(path)] == [str(i) for i in range(200)]


def test_demonstrations_and_pairs_in_parquet_and_prompts_in_json_lines(made: Any) -> None:
    embedded = [{"bytes": made.picture(), "path": "somewhere.png"}]
    (row,) = read_sft(made.parquet(made.sft(images=embedded)))
    (same,) = read_sft(made.jsonl(made.sft()))
    assert replace(row, source=same.source) == same
    assert len(read_pairs(made.parquet(made.pair(image=embedded)))) == 1
    (row,) = read_rlvr(made.jsonl(made.rlvr(images=["a.png"])))
    (same,) = read_rlvr(made.parquet(made.rlvr()))
    assert replace(row, source=same.source) == same


@pytest.mark.parametrize("kind", ["sft", "rlvr", "alignment"])
def test_damaged_parquet_is_named_or_harmless(made: Any, kind: str) -> None:
    read = {"sft": read_sft, "rlvr": read_rlvr, "alignment": read_alignment}[kind]
    row = getattr(made, kind)() | {"images": [{"bytes": made.picture(), "path": None}]}
    whole = made.parquet(*[row] * 3, write_page_checksum=False).read_bytes()
    for position in range(0, len(whole), len(whole) // 60):
        damaged = whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
        for content in (damaged, whole[:position]):
            try:
                read(made.file(content, "damaged.parquet"))
            except UserError as fault:
                assert "damaged.parquet" in str(fault) or "rows cannot be used" in str(fault)  # noqa: PT017


def test_a_flipped_byte_in_a_written_page_is_found(made: Any) -> None:
    rows = read_rlvr(made.parquet(made.rlvr()))
    write_prompts(made.folder / "x.parquet", rows)
    content = bytearray((made.folder / "x.parquet").read_bytes())
    content[content.index(b"How many?")] ^= 1
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read from row 0 on"):
        read_rlvr(made.file(bytes(content), "x.parquet"))


def test_missing_columns_are_named(made: Any) -> None:
    row = made.rlvr()
    del row["reward_model"], row["answer"]
    with pytest.raises(
        UserError, match=r"column\(s\) \['reward_model or answer or solution or ground_truth'\] missing, has \['images'"
    ):
        read_rlvr(made.parquet(row))


def test_prompts_whose_extra_columns_have_no_common_type_are_written(made: Any) -> None:
    rows = read_rlvr(
        [
            made.parquet(made.rlvr(id=i, extra_info={"index": x}), name=f"{i}.parquet")
            for i, x in enumerate((3, "three"))
        ]
    )
    write_prompts(made.folder / "x.parquet", rows)
    assert [row.extra for row in read_rlvr(made.folder / "x.parquet")] == [{"index": 3}, {"index": "three"}]
