"""SFT on the files that users have: chats of every form, with broken and overlong rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.observe import metrics as names


def mixed_rows(tiny_data: Path) -> list[dict[str, Any]]:
    """Rows of the built-in task, and among them every kind of chat, a broken row and overlong ones."""
    lines = (tiny_data / "sft.jsonl").read_text().splitlines()[:14]
    rows: list[dict[str, Any]] = [json.loads(line) | {"id": i} for i, line in enumerate(lines)]
    for row in rows:
        row["images"] = [str(tiny_data / image) for image in row["images"]]
    question, answer = (turn["value"] for turn in rows[0]["conversations"])
    image = rows[0]["images"][0]

    def chat(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    rows[1:1] = [
        {"id": "text only", "conversations": chat("How many?", "Two.")},
        {"id": "several turns", "conversations": chat(question, answer, "Sure?", "Yes."), "images": [image]},
        {"id": "two images", "conversations": chat("<image> and <image>?", "Two."), "images": [image] * 2},
        {"id": "system", "system": "Be brief.", "conversations": chat(question, "4"), "images": image},
        {"id": "long", "conversations": chat(question + " and the blue ones" * 3000, answer), "images": [image]},
        {"id": "no answer", "conversations": chat(question), "images": [image]},
        {"id": "broken image", "conversations": chat(question, answer), "images": ["sft.jsonl"]},
    ]
    return rows


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mixed_file_trains_with_any_number_of_workers(
    ranks: int, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, launch: Callable[..., str]
) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in mixed_rows(tiny_data)))
    losses = {}
    for workers in (0, 2):
        output = launch(
            ranks,
            [
                *("-m", "recipes.train", "tiny_sft", f"model.hf_checkpoint={tiny_checkpoint}", f"data={data}"),
                *(
                    f"run.dir={tmp_path}/runs",
                    f"run.name=workers_{workers}",
                    "run.train_iters=4",
                    "eval.num_questions=0",
                ),
                *("global_batch_size=6", "max_tokens_per_microbatch=2048", "dataset.max_bad_fraction=0.1"),
                f"dataset.workers={workers}",
            ],
        )
        folder = tmp_path / "runs" / f"workers_{workers}"
        assert "sft: 18 rows, 6 in an iteration; 4 iterations are 1.333 epochs" in output
        assert f"skipped 3 of 21 rows, listed in {folder}/skipped_rows.jsonl" in output
        skipped = [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]
        assert [row["source"].rpartition(", ")[2] for row in skipped] == ["line 7", "line 8", "line 6"]
        faults = [row["fault"].partition(": ")[2] for row in skipped]
        assert faults[0].startswith("the last turn must be the assistant's demonstration")
        assert faults[1].startswith("not a readable image")
        assert faults[2].endswith("tokens do not fit 2048; raise max_tokens_per_microbatch, or drop the row")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[workers] = [row[names.LOSS] for row in rows]
    assert len(losses[0]) == 4
    assert losses[0] == losses[2], "workers change no number"
