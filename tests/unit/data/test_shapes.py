import json
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.data.dataset import read_alignment, read_rlvr, read_sft
from prism_megatron.data.response import parse_response
from prism_megatron.data.shapes import (
    ShapesConfig,
    caption_recall,
    question_of,
    sample_texts,
    scene_of,
    solve,
    step_correct,
    write_shapes_data,
)
from prism_megatron.data.shapes_scene import render

SMALL = ShapesConfig(sft_rows=30, alignment_rows=20, rlvr_rows=20, heldout_rows=40)
FILES = ("sft.jsonl", "alignment.parquet", "rlvr_candidates.parquet", "heldout.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes_data(folder, SMALL)
    return folder


def test_every_file_is_read_by_the_released_formats_reader(data: Path):
    assert len(read_sft(data / "sft.jsonl")) == 30
    assert len(read_alignment(data / "alignment.parquet")) == 20
    assert len(read_rlvr(data / "rlvr_candidates.parquet")) == 20
    assert len(read_rlvr(data / "heldout.parquet")) == 40


def test_the_prompt_is_the_picture_and_the_question_alone(data: Path):
    for example in read_rlvr(data / "heldout.parquet"):
        (message,) = example.messages
        assert (message.role, message.content) == ("user", "<image>" + question_of(example).text)
        assert example.images == (render(scene_of(example)),)
        assert example.answer == solve(scene_of(example), question_of(example)).answer
        assert example.data_source == "shapes"


def test_the_teacher_of_the_alignment_set_is_faithful(data: Path):
    for example in read_alignment(data / "alignment.parquet"):
        response = parse_response(example.response or "")
        assert response is not None
        assert caption_recall(scene_of(example), example.teacher_caption or "") == 1
        assert step_correct(scene_of(example), question_of(example), response.think) == 1


def test_heldout_scenes_are_seen_nowhere_else(tmp_path: Path):
    """One object in a scene leaves 72 scenes in all: splits drawn independently would surely overlap."""
    config = replace(SMALL, min_objects=1, max_objects=1)
    write_shapes_data(tmp_path, config)
    heldout = {scene_of(e).key for e in read_rlvr(tmp_path / "heldout.parquet")}
    others = {scene_of(e).key for e in read_rlvr(tmp_path / "rlvr_candidates.parquet")}
    others |= {scene_of(e).key for e in read_alignment(tmp_path / "alignment.parquet")}
    assert len(heldout) > 20
    assert not heldout & others


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(data: Path, tmp_path: Path):
    write_shapes_data(tmp_path / "same", SMALL)
    write_shapes_data(tmp_path / "other", replace(SMALL, seed=1))
    for name in FILES:
        assert (tmp_path / "same" / name).read_bytes() == (data / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (data / name).read_bytes()


def test_a_finished_data_set_is_left_alone_and_a_different_one_replaced(tmp_path: Path):
    write_shapes_data(tmp_path, SMALL)
    (tmp_path / "sft.jsonl").write_text("touched")
    write_shapes_data(tmp_path, SMALL)
    assert (tmp_path / "sft.jsonl").read_text() == "touched"
    write_shapes_data(tmp_path, replace(SMALL, sft_rows=10))
    assert len(read_sft(tmp_path / "sft.jsonl")) == 10
    assert len(list((tmp_path / "images").iterdir())) == 10  # none left over from the larger set
    assert json.loads((tmp_path / "shapes.json").read_text())["sft_rows"] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft_rows": 0}, "sft_rows=0"),
        ({"max_objects": 7}, "max_objects=7.*6 cells"),
        ({"slip_rate": 1.5}, "slip_rate=1.5"),
        ({"vague_rates": (0.0, -1.0)}, r"vague_rates\[1\]=-1.0"),
        ({"glance_rates": (0.0, 0.0, 0.0, 2.0, 0.0)}, r"glance_rates\[3\]=2.0"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**changes)  # type: ignore[arg-type]


def test_sample_texts_holds_question_and_both_demonstrations():
    texts = sample_texts(2)
    assert len(texts) == 6
    assert texts[0].endswith("?") or " D. " in texts[0]
    assert parse_response(texts[1])
    assert parse_response(texts[2])
