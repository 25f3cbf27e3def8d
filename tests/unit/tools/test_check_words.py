"""The vocabulary check finds a word of each kind, with its line and its replacement, and passes plain code."""

from __future__ import annotations

from tools.check_words import check_markdown, check_python

SOURCE = '''"""Load a model."""

held_rows = [1]


def f(owner, plan):
    """What it says."""
    self.mine = owner  # is told later
    raise ValueError(f"beside {plan}")


def placeholder(plan, replaced):
    """Return the plan, in place."""
    return f"{plan} withheld"
'''


def test_each_kind_of_finding_has_its_line_and_its_replacement() -> None:
    findings = sorted((line, message.split(":")[0]) for line, message in check_python(SOURCE))
    assert findings == [
        (3, "name 'held_rows'"),
        (6, "docstring begins with 'What'"),
        (6, "name 'owner'"),
        (8, "name 'mine'"),
        (8, "word 'told'"),
        (9, "word 'beside'"),
    ]
    assert (
        "name 'held_rows': not 'held', but what it is: reference_logprobs, in_use, ..."
        in dict(check_python(SOURCE)).values()
    )


def test_markdown_is_read_by_line() -> None:
    assert [line for line, _ in check_markdown("Rows and\nranks, lest\nthey wait.\n")] == [2]
