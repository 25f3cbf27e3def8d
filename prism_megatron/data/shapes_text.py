"""Demonstrations of the built-in visual task, written and graded by program.

Two qualities exist. ``faithful`` names every object and keeps a tally, cell by cell, of whatever it counts. ``broad``
is a mixture, as a large distilled corpus is: captions grow vague towards the bottom, reasoning about harder questions
is mostly a glance that states the result without a step, and some of it looks at the picture wrongly.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from prism_megatron.data.response import render_response
from prism_megatron.data.shapes_scene import (
    COLORS,
    COLUMNS,
    LETTERS,
    RELATIONS,
    ROWS,
    SHAPES,
    Question,
    Scene,
    Thing,
    lies,
    matches,
    number,
)

EMPTY, VAGUE = "none", "object"


@dataclass(frozen=True)
class Solution:
    """The reasoning as a list of steps, what they result in, and the answer (a letter where options are offered)."""

    steps: tuple[str, ...]
    result: str
    answer: str


def solve(scene: Scene, question: Question) -> Solution:
    """The reference solution of a question about a scene."""
    match question.kind:
        case "count" | "comparison" | "arithmetic":
            steps = [line for term in question.terms for line in _tally(scene, term)]
            if question.kind == "comparison":
                first, second = (scene.count(term) for term in question.terms)
                steps.append(f"{first}{'>' if first > second else '=' if first == second else '<'}{second}")
                result = "yes" if first > second else "no"
            else:
                result = str(number(scene, question))
            if question.kind == "arithmetic":
                steps.append(f"{question.operator.join(str(scene.count(term)) for term in question.terms)}={result}")
        case "position":
            first_thing, second_thing = (_find(scene, term) for term in question.terms)
            steps = [f"{thing.name}: {thing.cell}" for thing in (first_thing, second_thing)]
            result = "yes" if lies(first_thing, question.operator, second_thing) else "no"
        case _:
            reference = _find(scene, question.terms[0])
            rows, columns = RELATIONS[question.operator]
            target = scene.at(reference.row + rows, reference.column + columns)
            assert target is not None, f"no neighbour in {scene} for {question}"
            steps = [f"{reference.name}: {reference.cell}", f"{target.cell}: {target.name}"]
            result = target.name
    answer = LETTERS[question.options.index(result)] if question.options else result
    return Solution(tuple(steps), result, answer)


# Writing --------------------------------------------------------------------------------------------------------------


def faithful_demonstration(scene: Scene, question: Question) -> str:
    """Every object named, every step taken, always right."""
    solution = solve(scene, question)
    return _demonstration(dense_caption(scene), solution.steps, solution.answer)


def broad_demonstration(
    rng: random.Random,
    scene: Scene,
    question: Question,
    *,
    vague_rates: tuple[float, ...],
    glance_rate: float,
    slip_rate: float,
) -> str:
    """A demonstration of mixed quality.

    ``vague_rates[row]`` is the chance that an object of that row is only called "object", ``glance_rate`` that the
    reasoning skips its steps, ``slip_rate`` that it reads the picture wrongly and so reaches a wrong answer.
    """
    cells = _cells(scene)
    for thing in scene.things:
        if rng.random() < vague_rates[thing.row]:
            cells[thing.row][thing.column] = VAGUE
    solution = solve(scene, question)
    if rng.random() < slip_rate:
        solution = _slipped(rng, scene, question) or solution
    steps = (f"at a glance: {solution.result}",) if rng.random() < glance_rate else solution.steps
    return _demonstration(_caption(cells), steps, solution.answer)


def dense_caption(scene: Scene) -> str:
    """All cells in raster order, one line for each row."""
    return _caption(_cells(scene))


def _demonstration(caption: str, steps: tuple[str, ...], answer: str) -> str:
    return render_response(f"\n{caption}\n", f"\n{_bullets(steps)}\n", answer)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cells(scene: Scene) -> list[list[str]]:
    things = [[scene.at(row, column) for column in range(len(COLUMNS))] for row in range(len(ROWS))]
    return [[EMPTY if thing is None else thing.name for thing in row] for row in things]


def _caption(cells: list[list[str]]) -> str:
    return _bullets(f"{name}: {', '.join(row)}" for name, row in zip(ROWS, cells, strict=True))


def _slipped(rng: random.Random, scene: Scene, question: Question) -> Solution | None:
    """The solution for the scene as a careless eye sees it (one object mistaken), if that changes the answer."""
    right = solve(scene, question)
    for _ in range(20):
        mistaken = _misread(rng, scene)
        if not _answerable(mistaken, question):
            continue
        solution = solve(mistaken, question)
        if solution.answer != right.answer:
            return solution
    return None


def _misread(rng: random.Random, scene: Scene) -> Scene:
    things = list(scene.things)
    i = rng.randrange(len(things))
    seen = things[i]
    match rng.choice(("color", "shape", "swap")):
        case "color":
            things[i] = Thing(seen.row, seen.column, rng.choice(list(COLORS)), seen.shape)
        case "shape":
            things[i] = Thing(seen.row, seen.column, seen.color, rng.choice(SHAPES))
        case _:
            j = rng.randrange(len(things))
            other = things[j]
            things[i] = Thing(seen.row, seen.column, other.color, other.shape)
            things[j] = Thing(other.row, other.column, seen.color, seen.shape)
    return Scene(tuple(things), scene.look)


def _answerable(scene: Scene, question: Question) -> bool:
    names = [t.name for t in scene.unique()]
    match question.kind:
        case "position":
            return all(term in names for term in question.terms)
        case "neighbour":
            if question.terms[0] not in names:
                return False
            reference, (rows, columns) = _find(scene, question.terms[0]), RELATIONS[question.operator]
            target = scene.at(reference.row + rows, reference.column + columns)
            return target is not None and target.name in question.options
        case "comparison":
            return True
        case _:
            value = number(scene, question)
            return value >= 0 and (not question.options or str(value) in question.options)


def _tally(scene: Scene, condition: str) -> list[str]:
    """One line for each row: what of each cell the condition is about, + where that satisfies it, the count so far."""
    lines, total = [], 0
    for row, row_name in enumerate(ROWS):
        counted = []
        for column in range(len(COLUMNS)):
            thing = scene.at(row, column)
            counts = thing is not None and matches(condition, thing)
            total += counts
            counted.append(f"{_seen(condition, thing)}{'+' if counts else '='}{total}")
        lines.append(f"{condition}, {row_name}: {', '.join(counted)}")
    return lines


def _seen(condition: str, thing: Thing | None) -> str:
    if thing is None:
        return EMPTY
    return thing.color if condition in COLORS else thing.shape if condition in SHAPES else thing.name


def _find(scene: Scene, name: str) -> Thing:
    return next(t for t in scene.things if t.name == name)


# Grading --------------------------------------------------------------------------------------------------------------


def caption_recall(scene: Scene, caption: str) -> float:
    """Fraction of the scene's objects that a caption names with the right colour and shape in the right cell."""
    named: dict[str, list[str]] = {}
    for line in caption.splitlines():
        row, _, cells = line.removeprefix("- ").partition(":")
        named.setdefault(row, [cell.strip() for cell in cells.split(",")])
    hits = [
        named.get(ROWS[t.row], [])[t.column : t.column + 1] == [t.name] and len(named[ROWS[t.row]]) == len(COLUMNS)
        for t in scene.things
    ]
    return sum(hits) / len(hits)


def step_correct(scene: Scene, question: Question, think: str) -> float:
    """Fraction of the reference solution's facts that the reasoning states rightly.

    A fact is a line: what a row holds with the tally so far, where an object lies, or what the tallies come to. One
    that is stated twice with different values is not stated.
    """
    expected, stated = _facts(_bullets(solve(scene, question).steps)), _facts(think)
    return sum(stated.get(key) == value for key, value in expected.items()) / len(expected)


def _facts(think: str) -> dict[str, str | None]:
    facts: dict[str, str | None] = {}
    for line in think.splitlines():
        step = line.strip().removeprefix("- ")
        subject, colon, value = step.partition(": ")
        if not step:
            continue
        key, fact = (subject, value) if colon else ("result", step)
        facts[key] = fact if facts.get(key, fact) == fact else None
    return facts
