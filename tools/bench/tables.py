"""Write the tables of figures in README.md and tools/README.md from ``tools/bench/baselines/*.json``.

    python -m tools.bench.tables [--check]

``--check`` changes nothing and exits with status 1 where a table is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError
from tools.bench import harness
from tools.bench.memory import PARTS
from tools.processes import ROOT

BASELINES = Path(__file__).parent / "baselines"
README, DETAILS = ROOT / "README.md", ROOT / "tools" / "README.md"
BEGIN, END = "<!-- figures: written by python -m tools.bench.tables -->\n", "<!-- end of figures -->\n"
Row = Sequence[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table is out of date")
    arguments = parser.parse_args()
    outdated = 0
    for path, made in tables(BASELINES).items():
        text = path.read_text()
        updated = with_tables(text, made)
        outdated += text != updated
        if not arguments.check:
            path.write_text(updated)
    return int(arguments.check and outdated > 0)


def with_tables(text: str, made: str) -> str:
    """Return ``text`` with the lines between the marks replaced. Raises UserError unless each mark occurs once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"README must have the lines {BEGIN.strip()!r} and {END.strip()!r} once each")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]


def tables(folder: Path) -> dict[Path, str]:
    """Return the tables of the results in ``folder``, as Markdown, by the file they belong to."""
    from tools.plan.check import check

    paths = sorted(folder.glob("*.json"))
    results = {path.stem: harness.read_baseline(path) for path in paths}

    def of(kind: str) -> dict[str, dict[str, Any]]:
        return {name: result for name, result in results.items() if result["benchmark"] == kind}

    runs = of("train")
    first = [_trained({name: run for name, run in runs.items() if "ours_over_hf" in run})]
    first += [_sync(of("sync")), _scoring(of("discriminator"))]
    rest = [_trained(runs), _split(results["train"])]
    rest += [_profile(result) for result in of("profile").values()]
    rest += [_memory(result) for result in of("memory").values()]
    rest += [_pipeline(result) for result in of("pipeline").values()]
    rest += [_rollout(result) for result in of("rollout").values()]
    rest += ["".join(f"    {line}\n" for line in check(paths).splitlines())]
    commits = sorted({result["commit"][:7] for result in results.values()})
    hardware = sorted({f"{result['hardware']}, {result['cores']} cores" for result in results.values()})
    source = f"On {', '.join(hardware)}; commits {', '.join(commits)}.\n"
    return {README: "\n" + "\n".join(first) + "\n", DETAILS: "\n" + "\n".join([*rest, source])}


def _trained(runs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            "training step",
            "ranks",
            "tokens a step",
            "tokens/s/rank",
            "slowest tenth",
            "GFLOP/s/rank",
            "speed-up over HF",
        ]
    ]
    for name, run in runs.items():
        ours = run["ours"]
        slowest = ours["tokens_per_second_p90_slowest"] / run["ranks"]
        over = f"{run['ours_over_hf']:.2f}" if "ours_over_hf" in run else "–"
        figures = [
            f"{ours['tokens_per_second_per_rank']:.0f}",
            f"{slowest:.0f}",
            f"{1e3 * ours['tflops_per_rank']:.0f}",
        ]
        rows.append([_named(name, "train"), str(run["ranks"]), f"{run['tokens_per_step']:.0f}", *figures, over])
    return _markdown(rows)


def _split(run: Mapping[str, Any]) -> str:
    split = run["ours"]["split"]
    parts = sorted((name for name in split if name != "step"), key=lambda name: -split[name])
    shares = [f"{split[name] / split['step']:.1%}" for name in parts]
    return _markdown([["share of a step", *parts], ["one rank", *shares]])


def _profile(result: Mapping[str, Any]) -> str:
    costs = result["costs"]
    names = [cost["operator"].removeprefix("aten::").lstrip("_") for cost in costs]
    names = [name.replace("scaled_dot_product_flash_attention_for_cpu", "attention") for name in names]
    return _markdown([["largest costs", *names], ["share of a step", *(f"{cost['share']:.1%}" for cost in costs)]])


def _memory(result: Mapping[str, Any]) -> str:
    """Return the table of measured MB, and of the estimate over the measurement."""
    rows: list[Row] = [["memory: measured MB × estimate / measured", *PARTS]]
    for case, stages in result["cases"].items():
        for found in {each["stage"]: each for each in stages}.values():
            stage = f", stage {found['stage']}" if len({each["stage"] for each in stages}) > 1 else ""
            pairs = [(found["measured"][part], found["estimated"][part]) for part in PARTS]
            rows.append([f"{case}{stage}", *(f"{m / 1e6:.1f} × {e / m:.2f}" if m else "0" for m, e in pairs)])
    return _markdown(rows)


def _pipeline(result: Mapping[str, Any]) -> str:
    rows: list[Row] = [["pipeline stage", "seconds", "share", "engine's share", "engine tokens/s", "time by timer"]]
    for name, stage in result["stages"].items():
        parts = sorted(stage["parts"].items(), key=lambda part: -part[1])
        timers = ", ".join(f"{part} {seconds / stage['seconds']:.0%}" for part, seconds in parts)
        engine = f"{stage['share_of_engine']:.0%}" if "share_of_engine" in stage else "–"
        rate = f"{stage['engine_tokens_per_second']:.0f}" if "engine_tokens_per_second" in stage else "–"
        share = f"{result['share_of_stages'][name]:.0%}"
        rows.append([name, f"{stage['seconds']:.0f}", share, engine, rate, timers])
    return _markdown(rows)


def _rollout(result: Mapping[str, Any]) -> str:
    """Return the tables of sampling by batch size, and of the largest batch's training step."""
    config, engines = result["config"], ("colocated", "child")
    sizes = [str(size) for size in config["prompts"]]
    rows: list[Row] = [
        ["engine", *(f"{int(size) * config['samples']} responses, tokens/s" for size in sizes)],
    ]
    rows += [[name, *(f"{result[name][size]['tokens_per_second']:.0f}" for size in sizes)] for name in engines]
    steps: list[Row] = [["engine", "sync, s", "rollout, s", "train, s", "engine's share of an RLVR step"]]
    for name in engines:
        step = result["step"][name]
        seconds = [f"{step[f'{part}_seconds']:.2f}" for part in ("sync", "rollout", "train")]
        steps.append([name, *seconds, f"{step['engine_share']:.0%}"])
    return _markdown(rows) + "\n" + _markdown(steps)


def _sync(runs: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["weight sync, MB", "ranks", "push, s", "disk, s", "disk / push", "transfer / copy", "extra memory, buckets"]
    rows: list[Row] = [head]
    for run in sorted(runs.values(), key=lambda run: (run["ranks"], run["weight_bytes"])):
        seconds = [f"{run[way]['seconds']['median']:.2f}" for way in ("push", "disk")]
        ratios = [f"{run['disk_over_push']:.1f}", f"{run['transfer_over_copy']:.2f}"]
        extra = f"{run['push_extra_peak_buckets']:.2f}"
        rows.append([f"{run['weight_bytes'] / 1e6:.0f}", str(run["ranks"]), *seconds, *ratios, extra])
    return _markdown(rows)


def _scoring(runs: Mapping[str, Mapping[str, Any]]) -> str:
    ways = ("packed", "one_at_a_time")
    rows: list[Row] = [
        ["scoring: tokens of an image", "of a response", *(f"{way}, sequences/s" for way in ways), "ratio"]
    ]
    for run in sorted(runs.values(), key=lambda run: run["mean_tokens"]["image"]):
        lengths = [f"{run['mean_tokens'][part]:.0f}" for part in ("image", "response")]
        rows.append([*lengths, *(f"{run[way]['sequences_per_second']:.0f}" for way in ways), f"{run['ratio']:.1f}"])
    return _markdown([[cell.replace("_", " ") for cell in row] for row in rows])


def _named(stem: str, kind: str) -> str:
    return stem.removeprefix(f"{kind}_").replace("_", " ") if stem != kind else "tiny recipe"


def _markdown(rows: Sequence[Row]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *body])


if __name__ == "__main__":
    sys.exit(main())
