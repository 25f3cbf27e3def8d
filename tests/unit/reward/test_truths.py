"""The truth of a row, as the reader hands it to the verifier: which column, which forms, which are refused."""

from __future__ import annotations

import io
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_megatron.data.dataset import read_rlvr
from prism_megatron.errors import UserError
from prism_megatron.reward.answer import is_correct
from prism_megatron.types import Example

NAN = float("nan")


def row_of(folder: Path, reward_model: object, **columns: object) -> Example:
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, format="PNG")
    row = {"images": [{"bytes": image.getvalue()}], "data_source": "own", "reward_model": reward_model} | columns
    row["prompt"] = [{"role": "user", "content": "<image>How many?"}]
    pq.write_table(pa.Table.from_pylist([row]), folder / "data.parquet")
    return read_rlvr(folder / "data.parquet")[0]


@pytest.mark.parametrize("absent", [None, "", "  \n", NAN, "nan"])
@pytest.mark.parametrize("other", [None, "", NAN])
def test_a_row_without_a_truth_is_refused_at_reading(absent: object, other: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.parquet, row 0: no answer; fill reward_model.ground_truth"):
        row_of(tmp_path, {"ground_truth": absent, "style": "rule"}, answer=other)


@pytest.mark.parametrize("absent", [None, "", " ", NAN])
def test_the_answer_column_stands_in_for_an_absent_ground_truth(absent: object, tmp_path: Path) -> None:
    assert row_of(tmp_path, {"ground_truth": absent, "style": "rule"}, answer="4").answer == "4"


@pytest.mark.parametrize("answer", ["There are 2 and 2 of them, together 4. #### 4", "5", None, NAN, ""])
def test_the_ground_truth_wins_over_an_answer_column_that_differs(answer: object, tmp_path: Path) -> None:
    assert row_of(tmp_path, {"ground_truth": "4", "style": "rule"}, answer=answer).answer == "4"


@pytest.mark.parametrize(
    ("truth", "said"), [(0, "0"), (4, "4"), (2.5, "5/2"), (0.1, "0.1"), (Decimal("1.50"), "1.5"), (False, "false")]
)
def test_a_truth_may_be_a_number(truth: object, said: str, tmp_path: Path) -> None:
    assert is_correct(said, row_of(tmp_path, {"ground_truth": truth, "style": "rule"}).answer or "")


@pytest.mark.parametrize("truth", [["4", "5"], {"value": "4"}, b"4"])
def test_a_truth_that_is_no_text_is_refused_by_its_column(truth: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 0: reward_model.ground_truth is .*; it must be one text or number"):
        row_of(tmp_path, {"ground_truth": truth, "style": "rule"})


@pytest.mark.parametrize(
    ("equivalents", "expected"),
    [
        ("42", ("42",)),
        (42, ("42",)),
        (["42", "XLII"], ("42", "XLII")),
        ([None, "42", " "], ("42",)),
        (NAN, ()),
        ("", ()),
        ([], ()),
        (None, ()),
    ],
)
def test_equivalents_are_a_list_or_one(equivalents: object, expected: tuple[str, ...], tmp_path: Path) -> None:
    row = row_of(tmp_path, {"ground_truth": "forty-two", "equivalent_answers": equivalents})
    assert row.equivalent_answers == expected
    assert is_correct("42", "forty-two", row.equivalent_answers) == ("42" in expected)
    assert not is_correct("4", "forty-two", row.equivalent_answers)


@pytest.mark.parametrize(
    "truth", ["<answer> 4 </answer>", "\\boxed{4}", "$4$", "\\(4\\)", "<answer>$\\boxed{4}$</answer>"]
)
def test_a_truth_keeps_its_meaning_in_its_wrapping(truth: str, tmp_path: Path) -> None:
    row = row_of(tmp_path, {"ground_truth": "x", "equivalent_answers": [truth]})
    assert is_correct("4", row_of(tmp_path, {"ground_truth": truth}).answer or "")
    assert is_correct("4", "x", row.equivalent_answers)
