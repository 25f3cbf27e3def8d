"""The built-in visual task: data files in the released formats, small enough to learn on two CPU cores.

``sft.jsonl``                demonstrations of broad, mixed quality (spec 1.2)
``alignment.parquet``        prompts with faithful demonstrations (spec 1.3)
``rlvr_candidates.parquet``  prompts with verifiable answers, before the filter by pass rate (spec 1.4)
``heldout.parquet``          the same columns, about scenes that no other file shows
"""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from prism_megatron.data.dataset import write_prompts
from prism_megatron.data.response import parse_response
from prism_megatron.data.shapes_scene import (
    COLUMNS,
    KINDS,
    ROWS,
    Question,
    Scene,
    draw_question,
    draw_scene,
    question_from_json,
    question_to_json,
    render,
    scene_from_json,
    scene_to_json,
)
from prism_megatron.data.shapes_text import (
    broad_demonstration,
    caption_recall,
    faithful_demonstration,
    solve,
    step_correct,
)
from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic
from prism_megatron.types import IMAGE_PLACEHOLDER, Example, Message

__all__ = [
    "Question",
    "Scene",
    "ShapesConfig",
    "caption_recall",
    "question_from_json",
    "sample_scenes",
    "sample_texts",
    "scene_from_json",
    "solve",
    "step_correct",
    "write_shapes_data",
]

DATA_SOURCE = "shapes"
MANIFEST = "shapes.json"


@dataclass(frozen=True)
class ShapesConfig:
    """Sizes (rows per file), the make-up of the scenes, and how careless the broad demonstrations are.

    ``vague_rates`` go by row of the grid, ``glance_rates`` by kind of question (see broad_demonstration).
    """

    seed: int = 0
    sft_rows: int = 16_000
    alignment_rows: int = 640
    rlvr_rows: int = 512
    heldout_rows: int = 512
    min_objects: int = 3
    max_objects: int = 6
    choice_rate: float = 0.25
    vague_rates: tuple[float, float] = (0.1, 0.6)
    glance_rates: tuple[float, float, float, float, float] = (0.25, 0.55, 0.55, 0.5, 0.5)
    slip_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("sft_rows", "alignment_rows", "rlvr_rows", "heldout_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: every file needs at least one row")
        cells = len(ROWS) * len(COLUMNS)
        if not 1 <= self.min_objects <= self.max_objects <= cells:
            raise UserError(
                f"min_objects={self.min_objects}, max_objects={self.max_objects}: the grid has {cells} cells, "
                f"choose 1 <= min_objects <= max_objects <= {cells}"
            )
        rates = {"choice_rate": self.choice_rate, "slip_rate": self.slip_rate}
        rates |= {f"vague_rates[{i}]": rate for i, rate in enumerate(self.vague_rates)}
        rates |= {f"glance_rates[{i}]": rate for i, rate in enumerate(self.glance_rates)}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise UserError(f"{name}={rate}: a rate lies between 0 and 1")


def write_shapes_data(out_dir: str | Path, config: ShapesConfig) -> None:
    """Write the four data files. Does nothing where the manifest says that this very config was already written."""
    out_dir = Path(out_dir)
    manifest = out_dir / MANIFEST
    manifest_text = json.dumps(asdict(config), indent=2) + "\n"
    if manifest.is_file() and manifest.read_text() == manifest_text:
        return
    if manifest.is_file():
        manifest.unlink()  # until the new files are whole, there is no data set here
        shutil.rmtree(out_dir / "images", ignore_errors=True)

    heldout = _examples("heldout", config.heldout_rows, config, faithful=False)
    unseen = {scene_of(example).key for example in heldout}
    alignment = _examples("alignment", config.alignment_rows, config, faithful=True, avoid=unseen)
    rlvr = _examples("rlvr", config.rlvr_rows, config, faithful=False, avoid=unseen)
    for example in (*alignment, *rlvr):
        assert scene_of(example).key not in unseen, f"{example.source} shows a held-out scene"
    write_prompts(out_dir / "heldout.parquet", heldout)
    write_prompts(out_dir / "alignment.parquet", alignment)
    write_prompts(out_dir / "rlvr_candidates.parquet", rlvr)
    _write_sft(out_dir, config, unseen)
    write_atomic(manifest, manifest_text)


def scene_of(example: Example) -> Scene:
    """The scene behind a prompt that was read from one of this task's parquet files."""
    return scene_from_json(example.extra["scene"])


def question_of(example: Example) -> Question:
    """The question behind a prompt that was read from one of this task's parquet files."""
    return question_from_json(example.extra["question"])


def sample_scenes(count: int, config: ShapesConfig) -> list[Image.Image]:
    """Some pictures of the task, to look at or to measure with."""
    drawn = (_draw("scenes", row, config, frozenset())[1] for row in range(count))
    return [Image.open(io.BytesIO(render(scene))).convert("RGB") for scene in drawn]


def sample_texts(count: int, seed: int = 0) -> list[str]:
    """Questions with both kinds of demonstration: the text a tokenizer for this task is trained on."""
    config = ShapesConfig(seed=seed)
    texts = []
    for i in range(count):
        rng, scene, question = _draw("texts", i, config, frozenset())
        texts += [question.text, faithful_demonstration(scene, question), _broad(rng, scene, question, config)]
    return texts


def _draw(
    split: str, row: int, config: ShapesConfig, avoid: frozenset[str] | set[str]
) -> tuple[random.Random, Scene, Question]:
    """Row ``row`` of a split. Each row has its own stream, so a size can change without changing the other rows."""
    rng = random.Random(f"{config.seed}/{split}/{row}")
    scene = draw_scene(rng, config.min_objects, config.max_objects)
    while scene.key in avoid:
        scene = draw_scene(rng, config.min_objects, config.max_objects)
    return rng, scene, draw_question(rng, scene, config.choice_rate)


def _broad(rng: random.Random, scene: Scene, question: Question, config: ShapesConfig) -> str:
    return broad_demonstration(
        rng,
        scene,
        question,
        vague_rates=config.vague_rates,
        glance_rate=config.glance_rates[KINDS.index(question.kind)],
        slip_rate=config.slip_rate,
    )


def _examples(
    split: str, rows: int, config: ShapesConfig, *, faithful: bool, avoid: frozenset[str] | set[str] = frozenset()
) -> list[Example]:
    examples = []
    for row in range(rows):
        _, scene, question = _draw(split, row, config, avoid)
        text = faithful_demonstration(scene, question) if faithful else None
        response = parse_response(text) if text else None
        examples.append(
            Example(
                id=f"{split}-{row}",
                messages=(Message("user", IMAGE_PLACEHOLDER + question.text),),
                images=(render(scene),),
                source=f"{split}, row {row}",
                response=text,
                answer=solve(scene, question).answer,
                teacher_caption=response.caption_block if response else None,
                teacher_reasoning=response.reasoning_block if response else None,
                data_source=DATA_SOURCE,
                extra={
                    "index": row,
                    "kind": question.kind,
                    "scene": scene_to_json(scene),
                    "question": question_to_json(question),
                },
            )
        )
    return examples


def _write_sft(out_dir: Path, config: ShapesConfig, unseen: set[str]) -> None:
    lines = []
    for row in range(config.sft_rows):
        rng, scene, question = _draw("sft", row, config, unseen)
        assert scene.key not in unseen, f"sft row {row} shows a held-out scene"
        image = f"images/{row:06d}.png"
        write_atomic(out_dir / image, render(scene), durable=False)
        turns = [
            {"from": "human", "value": IMAGE_PLACEHOLDER + question.text},
            {"from": "gpt", "value": _broad(rng, scene, question, config)},
        ]
        lines.append(json.dumps({"id": f"sft-{row}", "images": [image], "conversations": turns}))
    write_atomic(out_dir / "sft.jsonl", "".join(f"{line}\n" for line in lines))
