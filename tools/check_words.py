"""Check the project's vocabulary: ``python -m tools.check_words [PATH ...]`` (part of ``make lint``).

CONTRIBUTING.md has the glossary. Three rules, each with the replacement in its message:

- an identifier has no part from ``NAMES``;
- a docstring does not begin with a word from ``OPENERS``, which leave its subject open;
- prose (docstrings, comments, strings of Python files, and Markdown) has no word from ``PROSE``.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

NAMES = {
    "owner": "sample_id, pipeline_stage or owner_rank: say which",
    "owners": "sample_ids",
    "place": "position, index, rank or path: say which",
    "places": "positions, indices, ranks or paths: say which",
    "held": "what it is: reference_logprobs, in_use, ...",
    "told": "requested, received, given",
    "mine": "local_..., for this rank's part",
    "theirs": "hf_..., engine_..., or whose it is",
    "wanted": "requested, expected or required",
    "beside": "next_to, or what the second thing is",
    "kept": "what it is: retained, saved, cached",
    "shown": "images, displayed",
    "carried": "extra_state",
    "began": "start_time",
    "laid": "packed",
    "apart": "separate, split",
}
PROSE = {
    "aloud": "with a warning",
    "beside": "next to, compared with, in addition to",
    "lest": "so that ... not",
    "mine": "this rank's",
    "somebody": "a user, a process: say who",
    "theirs": "whose it is",
    "told": "asked, requested, received",
    "whom": "say who",
    "wherefore": "why",
}
OPENERS = (
    *("As", "At", "Between", "Both", "By", "Does", "For", "From", "How", "In", "Kept", "Of", "On", "That", "To"),
    *("What", "Where", "Whether", "Which", "Whose", "Why", "With", "Without"),
)
_PART = re.compile(r"[A-Z]?[a-z]+")
_WORD = re.compile(r"\b(" + "|".join(PROSE) + r")\b", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the vocabulary of Python and Markdown files.")
    parser.add_argument("paths", nargs="*", type=Path, help="files (default: all tracked ones)")
    paths = parser.parse_args().paths or tracked_files()
    findings = [finding for path in paths for finding in check_file(path)]
    print("\n".join(findings), end="\n" if findings else "")
    return 1 if findings else 0


def tracked_files() -> list[Path]:
    """Return Python and Markdown files under version control, without SPEC.md, this file and its test."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], capture_output=True, text=True, check=True)
    paths = [Path(line) for line in listed.stdout.splitlines() if Path(line).exists()]
    return [path for path in paths if path.name not in ("SPEC.md", "check_words.py", "test_check_words.py")]


def check_file(path: Path) -> Iterator[str]:
    """Yield ``path:line: what to change`` for each finding."""
    text = path.read_text()
    findings = check_python(text) if path.suffix == ".py" else check_markdown(text)
    for line, message in sorted(findings):
        yield f"{path}:{line}: {message}"


def check_python(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, message) for identifiers, docstrings, comments and strings of a Python source."""
    for node in ast.walk(ast.parse(text)):
        for name in _defined_names(node):
            for part in _PART.findall(name.replace("held_out", "")):
                if part.lower() in NAMES:
                    yield getattr(node, "lineno", 1), f"name {name!r}: not {part.lower()!r}, but {NAMES[part.lower()]}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            first = (ast.get_docstring(node) or "-").split()[0].rstrip(",:")
            if first in OPENERS:
                yield (
                    getattr(node, "lineno", 1),
                    f"docstring begins with {first!r}: begin with a verb or the noun it is about",
                )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, tokenize.FSTRING_MIDDLE):
            yield from _check_prose(token.string, token.start[0])


def check_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, message) for the prose of a Markdown text."""
    yield from _check_prose(text, 1)


def _check_prose(text: str, first_line: int) -> Iterator[tuple[int, str]]:
    for match in _WORD.finditer(text):
        word = match.group().lower()
        yield first_line + text.count("\n", 0, match.start()), f"word {word!r}: use {PROSE[word]}"


def _defined_names(node: ast.AST) -> list[str]:
    """Return the names that a syntax node defines: functions, classes, parameters, variables, attributes."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return []


if __name__ == "__main__":
    sys.exit(main())
