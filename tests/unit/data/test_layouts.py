"""A small made-up file in exactly the columns of each data set in use loads unchanged."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from prism_megatron.config import apply_overrides
from prism_megatron.data.dataset import read_rlvr, read_sft
from prism_megatron.data.response import render_response
from prism_megatron.data.rows import ReadOptions
from prism_megatron.errors import UserError
from prism_megatron.types import Example, Message
from recipes import tiny

USER = Message("user", "<image>How many?")
IMAGE = ["a.png"]


def embedded(made: Any) -> dict[str, Any]:
    return {"bytes": made.picture(), "path": "a.png"}


def chat(*turns: tuple[str, str], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: who, content: text} for who, text in turns]


def one(rows: Any) -> Example:
    (row,) = rows
    return row


# Demonstrations -------------------------------------------------------------------------------------------------------

SFT_ROWS = {
    "LLaMA-Factory sharegpt": {
        "conversations": chat(("human", "<image>How many?"), ("gpt", "Two."), role="from", content="value"),
        "images": IMAGE,
    },
    "LLaMA-Factory mllm_demo": {
        "messages": chat(("user", "<image>How many?"), ("assistant", "Two.")),
        "images": IMAGE,
    },
    "LLaMA-Factory alpaca": {"instruction": "How many?", "input": "", "output": "Two.", "images": IMAGE},
    "ms-swift messages": {"messages": chat(("user", "<image>How many?"), ("assistant", "Two.")), "images": IMAGE},
    "ms-swift query": {"query": "<image>How many?", "response": "Two.", "history": [], "images": IMAGE},
    "HF content parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
        ]
    },
    "LLaVA": {
        "id": "1",
        "image": "a.png",
        "conversations": chat(("human", "<image>How many?"), ("gpt", "Two."), role="from", content="value"),
    },
    "R1-V": {"image": "a.png", "problem": "How many?", "solution": "Two."},
}


@pytest.mark.parametrize("kind", SFT_ROWS)
def test_demonstrations(made: Any, kind: str) -> None:
    row = one(read_sft(made.jsonl(SFT_ROWS[kind])))
    assert (row.messages, row.response, row.images) == ((USER,), "Two.", (made.picture(),))


def test_alpaca_with_history_and_system(made: Any) -> None:
    row = one(
        read_sft(
            made.jsonl(
                {
                    "instruction": "And now?",
                    "input": "Look again.",
                    "output": "Three.",
                    "system": "Be exact.",
                    "history": [["<image>How many?", "Two."]],
                    "images": IMAGE,
                }
            )
        )
    )
    # the question of the first turn says where the image is, so the last one does not show it
    assert row.messages == (
        Message("system", "Be exact."),
        USER,
        Message("assistant", "Two."),
        Message("user", "And now?\nLook again."),
    )


def test_the_distilled_columns_of_prism(made: Any) -> None:
    fields = {"image": embedded(made), "question": "How many?", "visual_description": "Dots.", "reasoning": "1+1"}
    row = one(read_sft(made.parquet(fields | {"answer": "2"})))
    assert (row.messages, row.response) == ((USER,), render_response("Dots.", "1+1", "2"))
    assert row.answer == "2"


# Prompts with answers -------------------------------------------------------------------------------------------------

PARQUET_ROWS = {
    "verl geometry3k": {
        "data_source": "hiyouga/geometry3k",
        "prompt": chat(("user", "<image>How many?")),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"split": "train", "index": 0, "answer": "2", "question": "How many?"},
    },
    "hub geometry3k, EasyR1, MMR1-RL": {"problem": "<image>How many?", "answer": "2"},
    "MMK12": {"id": "u-1", "question": "How many?", "answer": "2", "subject": "math"},
    "R1-V, VLM-R1": {"problem": "How many?", "solution": "<answer> 2 </answer>"},
}


@pytest.mark.parametrize("kind", PARQUET_ROWS)
def test_prompts_in_parquet(made: Any, kind: str) -> None:
    column = {"image": embedded(made)} if kind.startswith(("MMK12", "R1")) else {"images": [embedded(made)]}
    row = one(read_rlvr(made.parquet(PARQUET_ROWS[kind] | column)))
    assert (row.messages, row.answer, row.images) == ((USER,), "2", (made.picture(),))


JSON_ROWS = {
    "MM-Eureka": {
        "id": "0",
        "conversations": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "file://{folder}/a.png"}, {"type": "text", "text": "How many?"}],
            }
        ],
        "answer": "2",
    },
    "ViRL39K": {
        "question": "<image>How many?",
        "answer": "\\boxed{2}",
        "PassRate_32BTrained": 0.5,
        "PassRate_7BBase": 0.25,
        "category": "STEM",
        "source": "x",
        "qid": "q-1",
        "image": ["a.png"],
    },
}


@pytest.mark.parametrize("kind", JSON_ROWS)
def test_prompts_in_json_lines(made: Any, kind: str) -> None:
    path = made.jsonl(JSON_ROWS[kind])
    path.write_text(path.read_text().replace("{folder}", str(made.folder)))
    row = one(read_rlvr(path))
    assert (row.messages, row.images) == ((USER,), (made.picture(),))
    assert (row.id, row.answer) in (("0", "2"), ("q-1", "\\boxed{2}"))


def test_demonstrations_may_be_prompts_where_they_have_an_answer(made: Any) -> None:
    turns = chat(("user", "How?"), ("assistant", "So."), ("user", "<image>How many?"), ("assistant", "Two."))
    row = one(read_rlvr(made.jsonl({"messages": turns, "images": IMAGE, "answer": 2})))
    assert ([m.role for m in row.messages], row.answer) == (["user", "assistant", "user"], "2")
    text_only = one(read_rlvr(made.jsonl({"prompt": "1 + 1?", "answer": "2"})))
    assert (text_only.messages, text_only.images) == ((Message("user", "1 + 1?"),), ())


# Images, columns and folders ------------------------------------------------------------------------------------------


def test_every_way_to_give_an_image(made: Any) -> None:
    encoded = base64.b64encode(made.picture()).decode()
    made.file(made.picture(), "my images/b.png")
    ways: list[Any] = [
        *(
            "a.png",
            ["a.png"],
            [{"path": "a.png"}],
            [{"bytes": encoded, "path": None}],
            f"data:image/png;base64,{encoded}",
        ),
        *(f"{made.folder}/a.png", "my images/b.png", f"file://{made.folder}/my%20images/b.png"),
    ]
    for images in ways:
        assert one(read_sft(made.jsonl(made.sft(images=images)))).images == (made.picture(),)
    for images in (made.picture(), [made.picture()], {"bytes": made.picture(), "path": None}):
        assert one(read_sft(made.parquet(made.sft(images=images)))).images == (made.picture(),)


def test_columns_of_other_names(made: Any) -> None:
    row = made.sft()
    row = {"dialog": row["conversations"], "pics": row["images"], "uid": "7"}
    options = ReadOptions(columns=("messages=dialog", "images=pics", "id=uid"))
    for path in (made.jsonl(row), made.parquet(row)):
        found = one(read_sft(path, options))
        assert (found.id, found.images, found.messages) == ("7", (made.picture(),), (USER,))
    with pytest.raises(UserError, match=r"column\(s\) \['conversations or dialog or instruction"):
        read_sft(made.parquet({"x": 1}), options)
    with pytest.raises(
        UserError, match=r"dataset\.columns must be a list of name=column, such as messages=dialog, got \[messages\]"
    ):
        apply_overrides(tiny.tiny_sft(), ["dataset.columns=[messages]"])


def test_images_in_a_folder_of_their_own(made: Any) -> None:
    made.file(made.picture(8), "store/deep/c.png")
    rooted = ReadOptions(image_root=f"{made.folder}/store")
    assert one(read_sft(made.jsonl(made.sft(images=["deep/c.png"])), rooted)).images == (made.picture(8),)
    for name in ("../a.png", f"{made.folder}/a.png", "deep/../../a.png", f"file://{made.folder}/a.png"):
        with pytest.raises(UserError, match="is outside of image_root"):
            read_sft(made.jsonl(made.sft(images=[name])), rooted)
    with pytest.raises(UserError, match=r"does not exist; paths are relative to image_root"):
        read_sft(made.jsonl(made.sft(images=["b.png"])), rooted)
