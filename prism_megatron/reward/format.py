"""The format reward (spec 5.3)."""

from __future__ import annotations

from prism_megatron.data.response import parse_response


def format_valid(text: str) -> bool:
    """Whether ``text`` is exactly one caption, one think and one answer block, in that order."""
    return parse_response(text) is not None
