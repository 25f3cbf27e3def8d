import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_megatron.data.dataset import read_alignment, read_pairs, read_rlvr, read_sft, write_pairs, write_prompts
from prism_megatron.data.response import SYSTEM_PROMPT
from prism_megatron.types import Example, Message, PreferencePair

RESPONSE = "<caption>c</caption>\n<think>t</think>\n<answer>4</answer>"


def png(shade: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def sft_row(**changes: object) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": RESPONSE}]
    return {"conversations": turns, "images": ["a.png"]} | changes


def write_jsonl(folder: Path, *rows: dict[str, object]) -> Path:
    (folder / "a.png").write_bytes(png())
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet_row(**changes: object) -> dict[str, object]:
    return {
        "images": [{"bytes": png()}],
        "data_source": "mm_gad",
        "prompt": [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "<image>How many?"}],
        "teacher_caption": "<caption>c</caption>",
        "teacher_cot": "<think>t</think>\n<answer>4</answer>",
        "teacher_response": RESPONSE,
        "answer": "4",
        "reward_model": {"ground_truth": "4", "style": "rule"},
    } | changes


def write_parquet(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def pair_row(**changes: object) -> dict[str, object]:
    return {
        "id": "p1",
        "image": "a.png",
        "question": "How many?",
        "teacher_caption": "<caption>c</caption>",
        "teacher_cot": "<think>t</think>\n<answer>4</answer>",
        "student_caption": "<caption>d</caption>",
        "student_cot": "<think>u</think><answer>5</answer>",
    } | changes


# What is read ---------------------------------------------------------------------------------------------------------


def test_sft_row(tmp_path: Path):
    (example,) = read_sft(write_jsonl(tmp_path, sft_row(id="x", system="Be exact.")))
    assert example == Example(
        id="x",
        messages=(Message("system", "Be exact."), Message("user", "<image>How many?")),
        images=(png(),),
        source=f"{tmp_path}/data.jsonl, line 1",
        response=RESPONSE,
        answer="4",
        teacher_caption="<caption>c</caption>",
        teacher_reasoning="<think>t</think>\n<answer>4</answer>",
    )


def test_sft_as_one_json_list_with_role_and_content(tmp_path: Path):
    turns = [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": RESPONSE}]
    path = write_jsonl(tmp_path)
    path.write_text(json.dumps([sft_row(conversations=turns), sft_row()]))
    first, second = read_sft(path)
    assert first.messages == second.messages == (Message("user", "<image>How many?"),)
    assert second.source.endswith("data.jsonl, row 1")


def test_alignment_row(tmp_path: Path):
    (example,) = read_alignment(write_parquet(tmp_path, parquet_row(extra_info={"index": 3, "kind": "count"})))
    assert example.id == "mm_gad/3"
    assert example.extra == {"index": 3, "kind": "count"}
    assert example.messages == (Message("system", "Be exact."), Message("user", "<image>How many?"))
    assert example.teacher_caption == "<caption>c</caption>"
    assert example.teacher_reasoning == "<think>t</think>\n<answer>4</answer>"
    assert (example.response, example.answer, example.data_source) == (RESPONSE, "4", "mm_gad")


def test_alignment_joins_the_halves_where_the_whole_is_blank(tmp_path: Path):
    (example,) = read_alignment(write_parquet(tmp_path, parquet_row(teacher_response="")))
    assert example.response == RESPONSE


def test_rlvr_needs_no_teacher_and_takes_the_answer_from_the_reward_model(tmp_path: Path):
    row = {k: v for k, v in parquet_row().items() if not k.startswith("teacher_") and k != "answer"}
    (example,) = read_rlvr(write_parquet(tmp_path, row))
    assert (example.answer, example.response, example.teacher_caption, example.extra) == ("4", None, None, {})


def test_pairs_in_the_released_form_get_the_papers_system_prompt(tmp_path: Path):
    (pair,) = read_pairs(write_jsonl(tmp_path, pair_row()))
    assert pair.messages == (Message("system", SYSTEM_PROMPT), Message("user", "<image>How many?"))
    assert pair.student_reasoning == "<think>u</think><answer>5</answer>"
    (bare,) = read_pairs(write_jsonl(tmp_path, pair_row(system="")))
    assert bare.messages == (Message("user", "<image>How many?"),)


# What is written ------------------------------------------------------------------------------------------------------


def test_pairs_survive_the_disk(tmp_path: Path):
    pair = PreferencePair(
        id="7",
        messages=(Message("system", "s"), Message("user", "<image>and <image>?")),
        images=(png(1), png(2)),
        source="",
        teacher_caption="<caption>c</caption>",
        teacher_reasoning="<think>t</think>\n<answer>4</answer>",
        student_caption="<caption>d</caption>",
        student_reasoning="<think>u</think>\n<answer>5</answer>",
    )
    path = tmp_path / "warmup" / "pairs.jsonl"
    write_pairs(path, [pair, replace(pair, id="8")])
    first, second = read_pairs(path)
    assert replace(first, source="") == pair
    assert second.id == "8"
    assert len(list((path.parent / "pairs_images").iterdir())) == 2  # each picture stored once


def test_prompts_survive_the_disk_with_and_without_a_teacher(tmp_path: Path):
    (taught,) = read_alignment(write_parquet(tmp_path, parquet_row(extra_info={"index": 3})))
    taught = replace(taught, equivalent_answers=("four", "4.0"))
    bare = replace(taught, response=None, teacher_caption=None, teacher_reasoning=None)
    write_prompts(tmp_path / "taught.parquet", [taught])
    write_prompts(tmp_path / "bare.parquet", [bare, bare])
    (again,) = read_alignment(tmp_path / "taught.parquet")
    assert replace(again, source=taught.source) == taught
    again = [replace(e, source=taught.source) for e in read_rlvr(tmp_path / "bare.parquet")]
    assert again == [bare, replace(bare, id=f"{bare.id}#2")]
    with pytest.raises(
        ValueError, match=r"column\(s\) \['teacher_caption', 'teacher_cot', 'teacher_response'\] missing"
    ):
        read_alignment(tmp_path / "bare.parquet")


def test_prompts_without_answers_are_not_written(tmp_path: Path):
    (example,) = read_rlvr(write_parquet(tmp_path, parquet_row()))
    with pytest.raises(ValueError, match="has no answer"):
        write_prompts(tmp_path / "x.parquet", [replace(example, answer=None)])
    with pytest.raises(ValueError, match="no examples to write"):
        write_prompts(tmp_path / "x.parquet", [])
    assert not (tmp_path / "x.parquet").exists()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, r"line 2: 1 <image> placeholder\(s\) for 0 image\(s\)"),
        ({"images": None}, r"line 2: 1 <image> placeholder\(s\) for 0 image\(s\)"),
        ({"images": ["b.png"]}, r"line 2: image .*b\.png does not exist"),
        ({"images": ["data.jsonl"]}, r"line 2, image data\.jsonl: not a readable image"),
        ({"images": ["a.png", "a.png"]}, r"line 2: 1 <image> placeholder\(s\) for 2 image\(s\)"),
        ({"conversations": None}, r"line 2: needs the key 'instruction' or 'query' or 'problem' or 'question'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"line 2: cannot read the turn"),
        ({"conversations": [{"from": "human", "value": "<image>x"}]}, r"line 2: the last turn must be the assistant's"),
        (
            {"conversations": [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": " \n"}]},
            r"line 2: the last turn, the demonstration, is blank",
        ),
    ],
)
def test_a_bad_sft_row_is_named(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        read_sft(write_jsonl(tmp_path, sft_row(), sft_row(**changes)))


def test_a_truncated_image_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"row 0, image 0: not a readable image"):
        read_rlvr(write_parquet(tmp_path, parquet_row(images=[{"bytes": png()[:40]}])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, r"row 1: 1 <image> placeholder\(s\) for 0 image"),
        ({"images": [{"bytes": b""}]}, r"row 1, image 0: an image is a path or a struct"),
        ({"prompt": [{"role": "user", "content": "How many?"}]}, r"row 1: 0 <image> placeholder\(s\) for 1 image"),
        ({"teacher_response": "4"}, r"row 1: the demonstration breaks the response grammar"),
        ({"answer": None, "reward_model": {"ground_truth": None, "style": "rule"}}, r"row 1: no answer"),
    ],
)
def test_a_bad_alignment_row_is_named(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        read_alignment(write_parquet(tmp_path, parquet_row(), parquet_row(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_cot": None}, r"line 1: needs the key 'student_cot'"),
        ({"student_caption": "red"}, r"line 1, student: the demonstration breaks"),
    ],
)
def test_a_bad_pair_is_named(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        read_pairs(write_jsonl(tmp_path, pair_row(**changes)))


def test_a_file_that_is_missing_empty_or_cut_off_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such data file"):
        read_sft(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"data\.jsonl: empty data set"):
        read_sft(write_jsonl(tmp_path))
    path = write_jsonl(tmp_path, sft_row())
    path.write_text(path.read_text()[:30])
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: not JSON"):
        read_sft(path)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cut\.parquet: not a parquet file"):
        read_rlvr(tmp_path / "cut.parquet")
    empty = write_parquet(tmp_path, parquet_row())
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    with pytest.raises(ValueError, match=r"data\.parquet: empty data set"):
        read_rlvr(empty)


# Chats of any form ----------------------------------------------------------------------------------------------------


def test_demonstrations_of_any_chat(tmp_path: Path):
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    rows = [
        {"conversations": turns("Say hello.", "Hello!")},
        {
            "conversations": turns("<image>What?", "A dot.", "And <image>?", "Two.", "Sure?", "Yes."),
            "images": ["a.png"] * 2,
        },
        {"conversations": turns("<image>4?", RESPONSE), "images": ["a.png"]},
        {"messages": [{"role": "system", "content": "Be brief."}, *sft_row()["conversations"]], "images": ["a.png"]},  # type: ignore[misc]
    ]
    text_only, several, grammar, system = read_sft(write_jsonl(tmp_path, *rows))
    assert (text_only.messages, text_only.images, text_only.response) == (
        (Message("user", "Say hello."),),
        (),
        "Hello!",
    )
    assert [m.role for m in several.messages] == ["user", "assistant"] * 2 + ["user"]
    assert (several.response, several.answer, len(several.images)) == ("Yes.", None, 2)
    assert (grammar.response, grammar.answer) == (RESPONSE, "4")
    assert system.messages[0] == Message("system", "Be brief.")
