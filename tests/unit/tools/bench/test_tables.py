"""README's figures are those of the baselines."""

from __future__ import annotations

import pytest

from tools.bench.tables import BASELINES, BEGIN, END, tables, with_tables


def test_readme_shows_what_the_baselines_say() -> None:
    for path, made in tables(BASELINES).items():
        text = path.read_text()
        assert with_tables(text, made) == text, "run python -m tools.bench.tables"


def test_only_what_is_between_the_marks_changes() -> None:
    assert with_tables(f"a\n{BEGIN}old\n{END}b\n", "new\n") == f"a\n{BEGIN}new\n{END}b\n"
    with pytest.raises(ValueError, match="once each"):
        with_tables("a\n", "new\n")
