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
        Thing(2, 2, "red", "circle"),
    ),
    look=5,
)
MORE = Question("comparison", ("red", "square"))


@pytest.mark.parametrize(
    ("question", "steps", "glance", "answer"),
    [
        (Question("count", ("red",)), ("red: 1+1+1=3",), ("red: 3",), "3"),
        (Question("count", ("red",), "", ("1", "2", "3", "4")), ("red: 1+1+1=3",), ("red: 3",), "C"),
        (MORE, ("red: 1+1+1=3", "square: 1+1+0=2", "3>2"), ("red: 3", "square: 2"), "yes"),
        (
            Question("comparison", ("circle", "square")),
            ("circle: 1+0+1=2", "square: 1+1+0=2", "2=2"),
            ("circle: 2", "square: 2"),
            "no",
        ),
        (
            Question("arithmetic", ("red", "square"), "*"),
            ("red: 1+1+1=3", "square: 1+1+0=2", "3*2=6"),
            ("red: 3", "square: 2"),
            "6",
        ),
        (
            Question("position", ("red square", "blue square"), "left of"),
            ("red square: middle center", "blue square: top right"),
            ("red square: middle center",),
            "yes",
        ),
        (
            Question("neighbour", ("extra",), "above", ("w", "blue square", "y", "z")),
            ("extra: middle right", "top right: blue square"),
            ("extra: middle right",),
            "B",
        ),
    ],
)
def test_solutions(question: Question, steps: tuple[str, ...], glance: tuple[str, ...], answer: str):
    scene = SCENE
    if question.kind == "neighbour":
        scene = Scene((*SCENE.things, Thing(1, 2, "green", "triangle")), 0)
        question = Question("neighbour", ("green triangle",), question.operator, question.options)
        steps, glance = (tuple(s.replace("extra", "green triangle") for s in part) for part in (steps, glance))
    solution = solve(scene, question)
    assert (solution.steps, solution.glance, solution.answer) == (steps, glance, answer)


def test_the_faithful_demonstration_says_everything():
    assert faithful_demonstration(SCENE, MORE) == (
        "<caption>\n- top: red circle, none, blue square\n- middle: none, red square, none\n"
        "- bottom: none, none, red circle\n</caption>\n"
        "<think>\n- red: 1+1+1=3\n- square: 1+1+0=2\n- 3>2\n</think>\n<answer>yes</answer>"
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
            random.Random(0), SCENE, MORE, vague_rates=(0, 0, vague), glance_rate=glance, slip_rate=slip
        )

    assert broad(0, 0, 0) == faithful_demonstration(SCENE, MORE)
    assert "- bottom: none, none, object\n" in broad(1, 0, 0)
    assert "<think>\n- red: 3\n- square: 2\n</think>\n<answer>yes</answer>" in broad(0, 1, 0)
    assert "<answer>no</answer>" in broad(0, 0, 1)


def test_a_slip_is_consistent_with_itself():
    """The wrong answer follows from wrongly seen facts: reasoning is never contradicted by its own answer."""
    rng = random.Random(1)
    for _ in range(200):
        scene = draw_scene(rng, 3, 6)
        question = draw_question(rng, scene, choice_rate=0.25)
        text = broad_demonstration(rng, scene, question, vague_rates=(0, 0, 0), glance_rate=0, slip_rate=1)
        response = parse_response(text)
        assert response is not None
        wrong = response.answer != solve(scene, question).answer
        assert wrong == (step_correct(scene, question, response.think) < 1)


def test_caption_recall():
    caption = dense_caption(SCENE)
    assert caption_recall(SCENE, caption) == 1
    assert caption_recall(SCENE, f"<caption>\n{caption}\n</caption>") == 1
    assert caption_recall(SCENE, caption.replace("blue square", "object")) == 3 / 4
    assert caption_recall(SCENE, caption.replace("none, red square, none", "red square, none, none")) == 3 / 4
    assert caption_recall(SCENE, caption.replace("none, none, red circle", "red circle")) == 3 / 4
    assert caption_recall(SCENE, "a red circle and a blue square") == 0


def test_step_correct():
    """Five facts: rows and total of both terms, and the comparison."""
    full = "\n- red: 1+1+1=3\n- square: 1+1+0=2\n- 3>2\n"
    assert step_correct(SCENE, MORE, full) == 1
    assert step_correct(SCENE, MORE, "- red: 3\n- square: 2") == 2 / 5
    assert step_correct(SCENE, MORE, full.replace("1+1+0=2", "1+0+0=1")) == 3 / 5
    assert step_correct(SCENE, MORE, full + "- red: 4\n") == 4 / 5  # the total of red is now contradicted
    assert step_correct(SCENE, MORE, "it is clear") == 0
    assert step_correct(SCENE, MORE, "") == 0
