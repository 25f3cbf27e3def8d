import io
import random

import pytest
from PIL import Image

from prism_megatron.data.shapes_scene import (
    COLORS,
    Question,
    Scene,
    Thing,
    draw_question,
    draw_scene,
    lies,
    matches,
    number,
    plural,
    question_from_json,
    question_to_json,
    render,
    scene_from_json,
    scene_to_json,
)

SCENE = Scene(
    (
        Thing(0, 0, "red", "circle"),
        Thing(0, 2, "blue", "square"),
        Thing(1, 1, "red", "square"),
        Thing(1, 2, "red", "circle"),
    ),
    look=5,
)


def pixels(scene: Scene) -> Image.Image:
    return Image.open(io.BytesIO(render(scene))).convert("RGB")


@pytest.mark.parametrize(
    ("condition", "count", "words"),
    [
        ("red", 3, "red objects"),
        ("circle", 2, "circles"),
        ("red circle", 2, "red circles"),
        ("blue circle", 0, "blue circles"),
        ("blue or circle", 3, "blue objects or circles"),
        ("red or square", 4, "red objects or squares"),
    ],
)
def test_conditions(condition: str, count: int, words: str):
    assert SCENE.count(condition) == count
    assert plural(condition) == words


def test_a_condition_needs_all_words_of_one_alternative():
    assert matches("red square", Thing(0, 0, "red", "square"))
    assert not matches("red square", Thing(0, 0, "red", "circle"))


def test_relations_hold_across_rows_and_columns():
    top_left, bottom_right = SCENE.things[0], SCENE.things[3]
    assert lies(top_left, "left of", bottom_right)
    assert lies(top_left, "above", bottom_right)
    assert not lies(top_left, "right of", bottom_right)
    assert not lies(SCENE.things[1], "above", SCENE.things[0])  # the same row


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (Question("count", ("red or circle",)), "How many red objects or circles are there?"),
        (Question("count", ("red",), "", ("0", "1", "2", "3")), "How many red objects are there? A. 0 B. 1 C. 2 D. 3"),
        (Question("comparison", ("red", "square")), "Are there more red objects than squares?"),
        (
            Question("arithmetic", ("red", "square"), "*"),
            "What is the number of red objects times the number of squares?",
        ),
        (Question("position", ("blue square", "red square"), "above"), "Is the blue square above the red square?"),
        (
            Question("neighbour", ("blue square",), "left of", ("red circle", "x", "y", "z")),
            "What is left of the blue square? A. red circle B. x C. y D. z",
        ),
    ],
)
def test_question_text(question: Question, text: str):
    assert question.text == text


def test_arithmetic():
    values = [number(SCENE, Question("arithmetic", ("red", "square"), operator)) for operator in "+-*"]
    assert values == [3 + 2, 3 - 2, 3 * 2]


def test_json_round_trip():
    question = Question("count", ("red",), "", ("0", "1", "2", "3"))
    assert scene_from_json(scene_to_json(SCENE)) == SCENE
    assert question_from_json(question_to_json(question)) == question


def test_the_picture_shows_each_object_in_the_middle_of_its_cell():
    image = pixels(SCENE)
    assert image.size == (96, 64)
    for thing in SCENE.things:
        # A triangle is full only below its centre; every shape covers this point whatever its jitter.
        shade = image.getpixel((thing.column * 32 + 15, thing.row * 32 + 17))
        assert all(abs(a - b) <= 15 for a, b in zip(shade, COLORS[thing.color], strict=True))


def test_the_look_changes_the_picture_and_not_the_scene():
    other = Scene(SCENE.things, look=6)
    assert other.key == SCENE.key
    assert render(SCENE) == render(scene_from_json(scene_to_json(SCENE)))
    assert render(other) != render(SCENE)


def test_sampled_questions_are_balanced_and_answerable():
    rng = random.Random(0)
    answers = {"position": [0, 0], "comparison": [0, 0]}
    for _ in range(400):
        scene = draw_scene(rng, 2, 6)
        assert 2 <= len(scene.things) <= 6
        question = draw_question(rng, scene, choice_rate=0.25)
        if question.kind == "position":
            first, second = ([t for t in scene.things if t.name == term] for term in question.terms)
            assert len(first) == len(second) == 1
            answers["position"][lies(first[0], question.operator, second[0])] += 1
        elif question.kind == "comparison":
            answers["comparison"][scene.count(question.terms[0]) > scene.count(question.terms[1])] += 1
        elif question.kind != "neighbour":
            assert number(scene, question) >= 0
            assert not question.options or str(number(scene, question)) in question.options
        assert len(set(question.options)) in (0, 4)
    for no, yes in answers.values():
        assert 0.35 < yes / (yes + no) < 0.65
