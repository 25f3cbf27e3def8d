import random

import pytest

from prism_megatron.data.response import parse_response
from prism_megatron.data.shapes_scene import Question, Scene, Thing, draw_question, draw_scene
from prism_megatron.data.shapes_text import (
    broad_demonstration,
    caption_recall,
    dense_caption,
    faithful_demonstration,
    solve,
    step_correct,
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
MORE = Question("comparison", ("red", "square"))
RED = ("red, top: red+1, none=1, blue=1", "red, bottom: none=1, red+2, red+3")
CIRCLE = ("circle, top: circle+1, none=1, square=1", "circle, bottom: none=1, square=1, circle+2")
SQUARE = ("square, top: circle=0, none=0, square+1", "square, bottom: none=1, square+2, circle=2")


@pytest.mark.parametrize(
    ("question", "steps", "result", "answer"),
    [
        (Question("count", ("red",)), RED, "3", "3"),
        (Question("count", ("red",), "", ("1", "2", "3", "4")), RED, "3", "C"),
        (
            Question("count", ("red circle",)),
            (
                "red circle, top: red circle+1, none=1, blue square=1",
                "red circle, bottom: none=1, red square=1, red circle+2",
            ),
            "2",
            "2",
        ),
        (
            Question("count", ("blue or circle",)),
            (
                "blue or circle, top: red circle+1, none=1, blue square+2",
                "blue or circle, bottom: none=2, red square=2, red circle+3",
            ),
            "3",
            "3",
        ),
        (MORE, (*RED, *SQUARE, "3>2"), "yes", "yes"),
        (
            Question("comparison", ("circle", "square")),
            (*CIRCLE, *SQUARE, "2=2"),
            "no",
            "no",
        ),
        (
            Question("arithmetic", ("red", "square"), "*"),
            (*RED, *SQUARE, "3*2=6"),
            "6",
            "6",
        ),
        (
            Question("position", ("red square", "blue square"), "left of"),
            ("red square: bottom center", "blue square: top right"),
            "yes",
            "yes",
        ),
        (
            Question("neighbour", ("red square",), "right of", ("w", "red circle", "y", "z")),
            ("red square: bottom center", "bottom right: red circle"),
            "red circle",
            "B",
        ),
    ],
)
def test_solutions(question: Question, steps: tuple[str, ...], result: str, answer: str):
    solution = solve(SCENE, question)
    assert (solution.steps, solution.result, solution.answer) == (steps, result, answer)


def test_the_faithful_demonstration_says_everything():
    assert faithful_demonstration(SCENE, MORE) == (
        "<caption>\n- top: red circle, none, blue square\n- bottom: none, red square, red circle\n</caption>\n"
        "<think>\n- red, top: red+1, none=1, blue=1\n- red, bottom: none=1, red+2, red+3\n"
        "- square, top: circle=0, none=0, square+1\n- square, bottom: none=1, square+2, circle=2\n- 3>2\n"
        "</think>\n<answer>yes</answer>"
    )


def test_the_faithful_demonstration_is_always_perfect():
    rng = random.Random(3)
    for _ in range(200):
        scene = draw_scene(rng, 2, 6)
        question = draw_question(rng, scene, choice_rate=0.25)
        response = parse_response(faithful_demonstration(scene, question))
        assert response is not None
        assert caption_recall(scene, response.caption) == 1
        assert step_correct(scene, question, response.think) == 1
        assert response.answer == solve(scene, question).answer


def test_the_broad_demonstration_follows_its_rates():
    def broad(vague: float, glance: float, slip: float) -> str:
        return broad_demonstration(
            random.Random(0), SCENE, MORE, vague_rates=(0, vague), glance_rate=glance, slip_rate=slip
        )

    assert broad(0, 0, 0) == faithful_demonstration(SCENE, MORE)
    assert "- bottom: none, object, object\n" in broad(1, 0, 0)
    assert "<think>\n- at a glance: yes\n</think>\n<answer>yes</answer>" in broad(0, 1, 0)
    assert "<answer>no</answer>" in broad(0, 0, 1)


def test_a_slip_is_consistent_with_itself():
    """The wrong answer follows from wrongly seen facts: reasoning is never contradicted by its own answer."""
    rng = random.Random(1)
    for _ in range(200):
        scene = draw_scene(rng, 3, 6)
        question = draw_question(rng, scene, choice_rate=0.25)
        text = broad_demonstration(rng, scene, question, vague_rates=(0, 0), glance_rate=0, slip_rate=1)
        response = parse_response(text)
        assert response is not None
        wrong = response.answer != solve(scene, question).answer
        assert wrong == (step_correct(scene, question, response.think) < 1)


def test_caption_recall():
    caption = dense_caption(SCENE)
    assert caption_recall(SCENE, caption) == 1
    assert caption_recall(SCENE, f"<caption>\n{caption}\n</caption>") == 1
    assert caption_recall(SCENE, caption.replace("blue square", "object")) == 3 / 4
    assert caption_recall(SCENE, caption.replace("top: red circle, none", "top: none, red circle")) == 3 / 4
    assert caption_recall(SCENE, caption.replace("red circle, none, blue", "red circle, blue")) == 2 / 4
    assert caption_recall(SCENE, "a red circle and a blue square") == 0


def test_step_correct():
    """Five facts: both rows of both terms, and the comparison."""
    full = "\n" + "".join(f"- {step}\n" for step in (*RED, *SQUARE, "3>2"))
    assert step_correct(SCENE, MORE, full) == 1
    assert step_correct(SCENE, MORE, f"- {RED[0]}\n- {SQUARE[0]}") == 2 / 5
    assert step_correct(SCENE, MORE, full.replace("red+2, red+3", "red+2, red=2").replace("3>2", "2=2")) == 3 / 5
    assert step_correct(SCENE, MORE, full.replace("none=1, blue=1", "none=1, green=1")) == 4 / 5  # right by accident
    assert step_correct(SCENE, MORE, full + "- red, bottom: none=1, red=1, red+2\n") == 4 / 5  # now contradicted
    assert step_correct(SCENE, MORE, "- at a glance: yes") == 0
    assert step_correct(SCENE, MORE, "") == 0
