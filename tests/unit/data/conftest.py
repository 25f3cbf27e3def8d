"""One valid row of each kind of data file, pictures for them, and the files themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

RESPONSE = "<caption>c</caption>\n<think>t</think>\n<answer>4</answer>"


class Made:
    """Rows and files in a folder that has the picture ``a.png``."""

    response = RESPONSE

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "a.png").write_bytes(self.picture())

    def picture(self, shade: int = 7, form: str = "PNG", **options: Any) -> bytes:
        return self.encoded(Image.new("RGB", (4, 4), (shade, 0, 0)), form, **options)

    def encoded(self, image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    def sft(self, **changes: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": RESPONSE}]
        return {"conversations": turns, "images": ["a.png"], "id": "s", "system": "Be exact."} | changes

    def rlvr(self, **changes: Any) -> dict[str, Any]:
        return {
            "images": [{"bytes": self.picture(), "path": None}],
            "data_source": "mm_gad",
            "prompt": [{"role": "user", "content": "<image>How many?"}],
            "answer": "4",
            "reward_model": {"ground_truth": "4", "style": "rule", "equivalent_answers": ["four"]},
            "extra_info": {"index": 3},
        } | changes

    def alignment(self, **changes: Any) -> dict[str, Any]:
        halves = {"teacher_caption": "<caption>c</caption>", "teacher_cot": "<think>t</think>\n<answer>4</answer>"}
        return self.rlvr(**halves, teacher_response=RESPONSE) | changes

    def pair(self, **changes: Any) -> dict[str, Any]:
        return {
            "id": "p",
            "image": "a.png",
            "question": "How many?",
            "system": "Be exact.",
            "teacher_caption": "<caption>c</caption>",
            "teacher_cot": "<think>t</think>\n<answer>4</answer>",
            "student_caption": "<caption>d</caption>",
            "student_cot": "<think>u</think><answer>5</answer>",
        } | changes

    def jsonl(self, *rows: Any, name: str = "data.jsonl") -> Path:
        return self.file("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), name)

    def parquet(self, *rows: dict[str, Any], name: str = "data.parquet", **options: Any) -> Path:
        pq.write_table(pa.Table.from_pylist(list(rows)), self.folder / name, **options)
        return self.folder / name

    def file(self, content: bytes, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)
