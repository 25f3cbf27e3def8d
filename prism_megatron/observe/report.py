"""The report of a run, from what its stages logged: ``python -m prism_megatron.observe.report runs/quickstart``.

``report.html`` is one page without further files.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prism_megatron.config import FINISHED
from prism_megatron.errors import UserError
from prism_megatron.files import iteration_rows, read_object, write_atomic
from prism_megatron.observe import metrics as names
from prism_megatron.observe.logger import METRICS, PICTURES, ROLLOUTS

STAGES = ("sft", "collect", "warmup", "align", "rlvr", "rlvr_only")  # in the order of the page
_GALLERY_PER_STAGE = 12
_MEAN_OVER = 5  # iterations of the running mean, or a hundredth of all if that is more

# Placeholder colours, replaced by variables of the page's style sheet, which has a light and a dark theme.
_SERIES = ("#010101", "#010102", "#010103")
_INK, _GRID = "#010104", "#010105"
_CSS = dict(zip((*_SERIES, _INK, _GRID), ("--series-1", "--series-2", "--series-3", "--muted", "--line"), strict=True))


@dataclass(frozen=True)
class Chart:
    """Metrics drawn on one pair of axes."""

    title: str
    metrics: tuple[str, ...]
    log_scale: bool = False


CHARTS = (
    Chart("Cross-entropy (nats per response token)", (names.LOSS,), log_scale=True),
    Chart("Reward", (names.REWARD,)),
    Chart(
        "Sampled responses: right answer, valid format, cut at the length limit",
        (names.ACCURACY, names.FORMAT_VALID, names.CUT_RESPONSES),
    ),
    Chart("Score gap, demonstration minus policy", (names.PERCEPTION_GAP, names.REASONING_GAP)),
    Chart("Pairs ranked correctly", (names.PERCEPTION_PAIR_ACCURACY, names.REASONING_PAIR_ACCURACY)),
    Chart("Discriminator loss (Bradley-Terry)", (names.DISCRIMINATOR_LOSS,)),
    Chart(
        "Difference of trainer and engine in log-probability: largest, mean (nats)",
        (names.TRAIN_ROLLOUT_LOGPROB_ABS_DIFF, names.TRAIN_ROLLOUT_MEAN_ABS_DIFF),
        log_scale=True,
    ),
    Chart("Entropy (nats per token)", (names.ENTROPY,)),
    Chart("Response length (tokens)", (names.RESPONSE_TOKENS,)),
    Chart("Gradient norm", (names.GRAD_NORM, names.DISCRIMINATOR_GRAD_NORM), log_scale=True),
)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run or of one stage's folder, finished or not; returns its path.

    Raises UserError if ``run_dir`` contains no stage with a log.
    """
    stages = [_stage(run_dir / name, name) for name in STAGES if (run_dir / name / METRICS).is_file()]
    if not stages and (run_dir / METRICS).is_file():  # of a single stage
        stages = [_stage(run_dir, run_dir.name)]
    if not stages:
        raise UserError(f"{run_dir} contains no stage with a {METRICS}; give a run, for example runs/quickstart")
    results_file = run_dir / "results.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent}
    page = environment.get_template("report.html.j2").render(name=run_dir.name, stages=stages, results=results)
    path = run_dir / "report.html"
    write_atomic(path, page)
    return path


def _stage(directory: Path, name: str) -> dict[str, Any]:
    rows = list(iteration_rows(directory / METRICS))
    config, versions, finished = (directory / file for file in ("config.yaml", "versions.json", FINISHED))
    summary = read_object(finished) or {}
    return {
        "name": name,
        "iterations": len(rows),
        "is_finished": bool(summary),
        "charts": [
            {"title": chart.title, "svg": _draw(chart, rows, f"{name}-{number}")}
            for number, chart in enumerate(CHARTS)
            if any(metric in row for metric in chart.metrics for row in rows)
        ],
        "seconds": _seconds(rows),
        "summary": {key.replace("_", " "): value for key, value in summary.items() if isinstance(value, int)},
        "rollouts": _gallery(directory),
        "config": config.read_text(errors="replace") if config.is_file() else "",
        "versions": read_object(versions) or {},
    }


def _gallery(directory: Path) -> list[dict[str, Any]]:
    """Return some of the stage's rollouts, each with its ``picture`` as a data URL, or None."""
    rows = _evenly_spaced(list(iteration_rows(directory / ROLLOUTS)), _GALLERY_PER_STAGE)
    return [row | {"picture": _address(directory / PICTURES, row)} for row in rows]


def _address(pictures: Path, row: Mapping[str, Any]) -> str | None:
    if "image_png_base64" in row:  # rows of older versions contain the picture
        return f"data:image/png;base64,{row['image_png_base64']}"
    if not row.get("image") or not (pictures / row["image"]).is_file():
        return None
    content = (pictures / row["image"]).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"  # browsers recognise the format by content


def _seconds(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the total seconds of each part of the stage's iterations."""
    total: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("seconds_"):
                part = key.removeprefix("seconds_")
                total[part] = total.get(part, 0.0) + value
    return total


def _evenly_spaced(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Select ``count`` rows at equal distances, including the first and the last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def _draw(chart: Chart, rows: Sequence[Mapping[str, Any]], salt: str) -> Markup:
    """Draw a chart as SVG with the colours of the page."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(4.6, 2.3), layout="constrained")
        for color, metric in zip(_SERIES, chart.metrics, strict=False):
            with_metric = [row for row in rows if metric in row]
            if not with_metric:
                continue
            x, y = [row["iteration"] for row in with_metric], [row[metric] for row in with_metric]
            marker = "o" if len(y) < 2 else None
            label = metric.replace("_", " ")
            if len(y) > 2 * _MEAN_OVER:
                axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
                y = _running_mean(y, max(_MEAN_OVER, len(y) // 100))
            axes.plot(x, y, color=color, linewidth=1.5, marker=marker, markersize=3, label=label)
        if chart.log_scale:
            axes.set_yscale("log")
        axes.grid(visible=True, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in _CSS.items():
        svg = svg.replace(color, f"var({variable})")
    # Ids of groups repeat between figures; only ids that are referred to (clip paths, glyphs) are salted.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)))


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Average each value with those before it, at most ``window`` values."""
    lows = [max(0, end - window) for end in range(1, len(values) + 1)]
    return [sum(values[low:end]) / (end - low) for end, low in enumerate(lows, start=1)]


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the folder of a run, or of one stage")
    try:
        print(write_report(parser.parse_args().run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
