"""Read a whole data file before a run: what is in it, what would be skipped and why, and how it is tokenised.

    python -m tools.check_data FILE --as sft [--hf DIR --max-tokens 8192] [--html page.html] [key=value ...]

Prints rows by kind, percentiles of tokens (of a sample) and of pixels, and the faults of rows, counted by kind.
``--html`` writes a page with ten rows, their images, and the tokens that the loss is on. key=value are settings of
``dataset``, for example ``columns=[messages=dialog]``. Exit status 1: a run on these settings would stop at this file.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from prism_megatron.errors import UserError

if TYPE_CHECKING:
    from prism_megatron.data.chat import ChatProcessor
    from prism_megatron.data.lazy import Rows
    from prism_megatron.sections import DatasetConfig
    from prism_megatron.types import Example

_SAMPLE_ROWS, _PAGE_ROWS = 1000, 10
_PERCENTILES = (0, 50, 90, 99, 100)
_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px sans-serif;max-width:60em;margin:2em auto}}
pre{{white-space:pre-wrap;background:#f6f6f6;padding:1em}} mark{{background:#bde5bd}}
img{{max-height:12em;margin:.3em}}</style>
<h1>{title}</h1><p>The loss is on the <mark>marked</mark> text.</p>{rows}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command. A user's mistake is one line on stderr and exit status 2."""
    args = _parser().parse_intermixed_args(arguments)
    try:
        return _check(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> int:
    from prism_megatron.data import dataset
    from prism_megatron.data.chat import ChatProcessor
    from prism_megatron.data.rows import ReadOptions

    settings = _settings(args.settings)
    options = ReadOptions.from_config(settings, args.cache)
    lenient = replace(options, skip_bad_rows=True, max_bad_fraction=1.0, check_images_max_rows=sys.maxsize)
    rows: Rows[Any] = getattr(dataset, f"read_{args.kind}")(args.file, lenient)
    count, faults = len(rows.row_index), dict(rows.row_index.faults)
    _print_kinds(rows)
    overlong: dict[int, str] = {}
    if args.hf:
        processor = ChatProcessor(args.hf, settings.min_pixels, settings.max_pixels)
        overlong = _print_lengths(rows, processor, args)
        if args.html:
            write_page(args.html, str(args.file), rows[:_PAGE_ROWS], processor)
    _print_faults("cannot be used", list(faults.values()), count)
    _print_faults("are too long", list(overlong.values()), count)
    stops = len(faults) > options.max_bad_fraction * count * options.skip_bad_rows
    stops = stops or (settings.overlong == "error" and bool(overlong))
    print(
        f"a run would {'stop at this file' if stops else 'skip these rows' if faults or overlong else 'take every row'}"
    )
    return int(stops)


def _settings(values: Sequence[str]) -> DatasetConfig:
    """The ``dataset`` section that the command line gives."""
    from prism_megatron.overrides import apply_overrides
    from prism_megatron.sections import DatasetConfig

    return apply_overrides(DatasetConfig(), values)


def _print_kinds(rows: Rows[Any]) -> None:
    entries = rows.row_index.entries[rows.numbers]
    print(f"{len(rows.row_index)} rows in {len(rows.row_index.files)} file(s), {len(rows)} can be used")
    for name, found in (
        ("images in a row", Counter(entries["images"].tolist())),
        ("turns of a row", Counter(" ".join(rows.row_index.roles[number]) for number in entries["roles"].tolist())),
    ):
        kinds = ", ".join(f"{kind or 'none'}: {count}" for kind, count in found.most_common(8))
        print(f"{name}: {kinds}{', ...' if len(found) > 8 else ''}")
    sizes = rows.row_index.image_sizes
    if len(sizes):
        _print_percentiles("pixels of an image", (sizes[::2].astype(int) * sizes[1::2]).tolist())


def _print_lengths(rows: Rows[Any], processor: ChatProcessor, args: argparse.Namespace) -> dict[int, str]:
    """Print how long a sample of rows is; return the faults of all rows that are too long, by position."""
    from prism_megatron.data.lengths import LengthLimit, overlong_rows, row_lengths

    limit = LengthLimit(args.max_tokens, "it is dropped", args.kind == "sft", args.kind == "sft")
    _print_percentiles("tokens of a row", row_lengths(rows[:: max(1, len(rows) // _SAMPLE_ROWS)], processor, limit))
    return overlong_rows(rows, processor, limit)


def _print_percentiles(name: str, values: list[int]) -> None:
    ordered = sorted(values)
    shares = [f"{p} %: {ordered[min(len(ordered) - 1, p * len(ordered) // 100)]}" for p in _PERCENTILES]
    print(f"{name} ({len(values)}): {', '.join(shares)}")


def _print_faults(what: str, faults: Sequence[str], count: int) -> None:
    """Print faults counted by kind: by their text without its source and numbers."""
    if not faults:
        return
    print(f"{len(faults)} of {count} rows {what}:")
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"'[^']*'|\d+|/\S+", "..", fault.partition(": ")[2])[:60], []).append(fault)
    for alike in sorted(kinds.values(), key=len, reverse=True):
        print(f"  {len(alike)} like: {alike[0]}")


def write_page(path: Path, title: str, rows: Sequence[Example], processor: ChatProcessor) -> None:
    """Write an HTML page with rows, their images, and their text with the trained tokens marked."""
    parts = []
    for row in rows:
        (prompt,) = processor.encode_prompts([row], train_answers=True)
        response = getattr(row, "response", None)
        ids = [*prompt.token_ids, *(() if response is None else processor.response_ids(response))]
        text, done = "", 0
        for start, end in (*prompt.loss_spans, (len(prompt.token_ids), len(ids))):
            before, trained = (html.escape(_text(part, processor)) for part in (ids[done:start], ids[start:end]))
            text, done = f"{text}{before}<mark>{trained}</mark>", end
        images = "".join(f'<img src="data:;base64,{base64.b64encode(image).decode()}">' for image in row.images)
        parts.append(f"<h2>{html.escape(row.source)}</h2>{images}<pre>{text}</pre>")
    path.write_text(_PAGE.format(title=html.escape(title), rows="".join(parts)))


def _text(ids: Sequence[int], processor: ChatProcessor) -> str:
    """Text of tokens, each run of image tokens as one."""
    image = "<|image_pad|>"
    runs = re.compile(f"({re.escape(image)})+")
    return runs.sub(lambda run: f"[{len(run[0]) // len(image)} image tokens]", processor.tokenizer.decode(ids))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a file, folder or pattern, as for data=")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the dataset section")
    parser.add_argument("--as", dest="kind", choices=("sft", "alignment", "rlvr", "pairs"), default="sft")
    parser.add_argument("--hf", type=Path, help="checkpoint whose tokenizer counts tokens")
    parser.add_argument("--max-tokens", type=int, default=8192, help="room for a prompt, in SFT with its answer")
    parser.add_argument("--html", type=Path, help="page of ten rows to write; needs --hf")
    parser.add_argument("--cache", type=Path, help="folder of the index, run.dir/data_cache of a run; none: temporary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
