"""Scenes and questions of the built-in visual task: what is in the picture and what is asked about it.

A scene is a grid of two rows and three columns of 32-pixel cells, so that with Qwen3-VL's own geometry (patch 16,
merge 2) one merged visual token covers one cell. Every scene and question can be rebuilt from its JSON, which the data
files carry along.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}
SHAPES = ("circle", "square", "triangle")
ROWS = ("top", "bottom")
COLUMNS = ("left", "center", "right")
KINDS = ("count", "comparison", "arithmetic", "position", "neighbour")
OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
# Relation -> (rows, columns) to step from the reference object.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
LETTERS = "ABCD"

CELL = 32  # pixels
WIDTH, HEIGHT = CELL * len(COLUMNS), CELL * len(ROWS)


@dataclass(frozen=True)
class Thing:
    """One object, in the cell of its row and column (0-based, from the top left)."""

    row: int
    column: int
    color: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def cell(self) -> str:
        return cell_name(self.row, self.column)


@dataclass(frozen=True)
class Scene:
    """Objects in raster order. ``look`` seeds everything that must not matter: jitter, shade, specks and lines."""

    things: tuple[Thing, ...]
    look: int

    @property
    def key(self) -> str:
        """The content of the scene, whatever its look: it distinguishes scenes when the splits are drawn."""
        return " ".join(f"{t.row}{t.column}{t.color}-{t.shape}" for t in self.things)

    def at(self, row: int, column: int) -> Thing | None:
        return next((t for t in self.things if (t.row, t.column) == (row, column)), None)

    def count(self, condition: str) -> int:
        return sum(matches(condition, t) for t in self.things)

    def unique(self) -> list[Thing]:
        """Objects that their colour and shape alone identify."""
        names = [t.name for t in self.things]
        return [t for t in self.things if names.count(t.name) == 1]


@dataclass(frozen=True)
class Question:
    """A question in a form a program can answer.

    ``kind``      one of KINDS: position asks whether X is left of Y, neighbour what is left of X
    ``terms``     conditions to count ("red", "circle", "red circle", "red or circle") or names of objects
    ``operator``  a key of OPERATORS (arithmetic) or of RELATIONS (position, neighbour)
    ``options``   the offered answers of a multiple-choice question, else empty
    """

    kind: str
    terms: tuple[str, ...]
    operator: str = ""
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The question as the prompt asks it."""
        first, second = self.terms[0], self.terms[-1]
        match self.kind:
            case "count":
                text = f"How many {plural(first)} are there?"
            case "comparison":
                text = f"Are there more {plural(first)} than {plural(second)}?"
            case "arithmetic":
                word = OPERATORS[self.operator]
                text = f"What is the number of {plural(first)} {word} the number of {plural(second)}?"
            case "position":
                text = f"Is the {first} {self.operator} the {second}?"
            case _:
                text = f"What is {self.operator} the {first}?"
        return " ".join([text, *(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))])


def cell_name(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


def matches(condition: str, thing: Thing) -> bool:
    """Tell if an object satisfies a condition: every word of one of its alternatives is its colour or shape."""
    return any(
        all(word in (thing.color, thing.shape) for word in alternative.split())
        for alternative in condition.split(" or ")
    )


def lies(first: Thing, relation: str, second: Thing) -> bool:
    """Tell if the first object is left of, right of, above or below the second, in whichever row or column."""
    rows, columns = RELATIONS[relation]
    return (first.row - second.row) * rows + (first.column - second.column) * columns > 0


def plural(condition: str) -> str:
    """A condition as a question words it: "red or circle" becomes "red objects or circles"."""
    words = [f"{part}s" if part.split()[-1] in SHAPES else f"{part} objects" for part in condition.split(" or ")]
    return " or ".join(words)


# JSON -----------------------------------------------------------------------------------------------------------------


def scene_to_json(scene: Scene) -> str:
    return json.dumps({"look": scene.look, "things": [[t.row, t.column, t.color, t.shape] for t in scene.things]})


def scene_from_json(text: str) -> Scene:
    record = json.loads(text)
    return Scene(tuple(Thing(*fields) for fields in record["things"]), record["look"])


def question_to_json(question: Question) -> str:
    return json.dumps(asdict(question))


def question_from_json(text: str) -> Question:
    record = json.loads(text)
    return Question(record["kind"], tuple(record["terms"]), record["operator"], tuple(record["options"]))


# Drawing at random ----------------------------------------------------------------------------------------------------


def draw_scene(rng: random.Random, min_objects: int, max_objects: int) -> Scene:
    """Sample a scene: how many objects, which cells, and each object's colour and shape, all uniform."""
    cells = [(row, column) for row in range(len(ROWS)) for column in range(len(COLUMNS))]
    chosen = sorted(rng.sample(cells, rng.randint(min_objects, max_objects)))
    things = tuple(Thing(row, column, rng.choice(list(COLORS)), rng.choice(SHAPES)) for row, column in chosen)
    return Scene(things, look=rng.getrandbits(31))


def draw_question(rng: random.Random, scene: Scene, choice_rate: float) -> Question:
    """Sample a question the scene can answer; ``choice_rate`` of those about numbers offer options instead."""
    while True:
        kind = rng.choice(("count", "comparison", "arithmetic", rng.choice(("position", "neighbour"))))
        question = _draw_of_kind(kind, rng, scene)
        if question is not None:
            break
    if question.kind in ("count", "arithmetic") and rng.random() < choice_rate:
        return Question(question.kind, question.terms, question.operator, _number_options(rng, number(scene, question)))
    return question


def number(scene: Scene, question: Question) -> int:
    """The value of a count or arithmetic question."""
    first, second = scene.count(question.terms[0]), scene.count(question.terms[-1])
    return {"": first, "+": first + second, "-": first - second, "*": first * second}[question.operator]


def _draw_of_kind(kind: str, rng: random.Random, scene: Scene) -> Question | None:
    """A question of this kind, or None where a few tries find none (the scene may not allow one)."""
    # Half of the yes/no questions aim at a yes, so that the answer is not given away by its frequency.
    aim = rng.random() < 0.5
    for _ in range(10):
        match kind:
            case "count":
                return Question(kind, (_condition(rng, scene, ("color", "shape", "color", "shape", "both", "union")),))
            case "comparison":
                terms = _two_conditions(rng, scene)
                if terms is not None and (scene.count(terms[0]) > scene.count(terms[1])) == aim:
                    return Question(kind, terms)
            case "arithmetic":
                terms, operator = _two_conditions(rng, scene), rng.choice(list(OPERATORS))
                if terms is not None and (operator != "-" or scene.count(terms[0]) >= scene.count(terms[1])):
                    return Question(kind, terms, operator)
            case "position":
                if len(scene.unique()) < 2:
                    return None
                first, second = rng.sample(scene.unique(), 2)
                relation = rng.choice(list(RELATIONS))
                if lies(first, relation, second) == aim:
                    return Question(kind, (first.name, second.name), relation)
            case _:
                neighbours = list(_neighbours(scene))
                if not neighbours:
                    return None
                reference, relation, target = rng.choice(neighbours)
                return Question(kind, (reference.name,), relation, _object_options(rng, scene, target))
    return None


def _condition(rng: random.Random, scene: Scene, forms: tuple[str, ...]) -> str:
    # An object that is there three times out of four: otherwise zero would be the answer to most questions.
    if rng.random() < 0.75:
        thing = rng.choice(scene.things)
        color, shape = thing.color, thing.shape
    else:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    form = rng.choice(forms)
    return {"color": color, "shape": shape, "both": f"{color} {shape}", "union": f"{color} or {shape}"}[form]


def _two_conditions(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    first, second = (_condition(rng, scene, ("color", "shape")) for _ in range(2))
    return (first, second) if first != second else None


def _neighbours(scene: Scene) -> Iterator[tuple[Thing, str, Thing]]:
    for thing in scene.unique():
        for relation, (rows, columns) in RELATIONS.items():
            target = scene.at(thing.row + rows, thing.column + columns)
            if target is not None:
                yield thing, relation, target


def _object_options(rng: random.Random, scene: Scene, target: Thing) -> tuple[str, ...]:
    present = sorted({t.name for t in scene.things} - {target.name})
    absent = sorted({f"{c} {s}" for c in COLORS for s in SHAPES} - {target.name, *present})
    wrong = rng.sample(present, min(2, len(present)))
    options = [target.name, *wrong, *rng.sample(absent, len(LETTERS) - 1 - len(wrong))]
    rng.shuffle(options)
    return tuple(options)


def _number_options(rng: random.Random, value: int) -> tuple[str, ...]:
    start = max(0, value - rng.randrange(len(LETTERS)))
    return tuple(str(start + i) for i in range(len(LETTERS)))


# The picture ----------------------------------------------------------------------------------------------------------


def render(scene: Scene) -> bytes:
    """The scene as a PNG of WIDTH x HEIGHT pixels. Specks and lines are grey: there to be ignored."""
    rng = random.Random(scene.look)
    image = Image.new("RGB", (WIDTH, HEIGHT), (rng.randint(225, 255),) * 3)
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 2)):
        ends = [rng.randrange(side) for side in (WIDTH, HEIGHT, WIDTH, HEIGHT)]
        canvas.line(ends, fill=(rng.randint(150, 200),) * 3)
    for thing in scene.things:
        size = rng.randint(18, 24)
        left = thing.column * CELL + rng.randint(2, CELL - size - 3)
        top = thing.row * CELL + rng.randint(2, CELL - size - 3)
        shade = tuple(min(255, max(0, level + rng.randint(-15, 15))) for level in COLORS[thing.color])
        box = (left, top, left + size, top + size)
        if thing.shape == "circle":
            canvas.ellipse(box, fill=shade)
        elif thing.shape == "square":
            canvas.rectangle(box, fill=shade)
        else:
            canvas.polygon([(left + size // 2, top), (left, top + size), (left + size, top + size)], fill=shade)
    for _ in range(rng.randint(2, 6)):
        x, y = rng.randrange(WIDTH - 2), rng.randrange(HEIGHT - 2)
        canvas.rectangle((x, y, x + 1, y + 1), fill=(rng.randint(120, 180),) * 3)
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return encoded.getvalue()
