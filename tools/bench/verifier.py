"""Benchmark the answer verifier: verdicts per second of one core, by kind of answer.

    python -m tools.bench.verifier

All answers but choices are distinct, so that no verdict is cached; half are correct. Symbolic answers, which
math-verify judges, are reported separately from the short ones. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from prism_megatron.reward.answer import is_correct
from tools.bench.harness import provenance, write

# From a number n: ground truth and a correct answer.
SHORT: dict[str, Callable[[int], tuple[str, str]]] = {
    "choice": lambda n: (f"({'ABCD'[n % 4]})", f"{'ABCD'[n % 4]}"),
    "number": lambda n: (f"{n:,}", f"{n}"),
    "unit": lambda n: (f"{n} m", f"{100 * n} cm"),
    "percentage": lambda n: (f"{n}\\%", f"{n / 100}"),
    "fraction": lambda n: (f"\\frac{{{n}}}{{7}}", f"{n}/7"),
    "interval": lambda n: (f"[{n}, {n + 1})", f"$[{n}, {n + 1})$"),
    "set": lambda n: (f"{n}, {n + 1}", f"{n + 1} and {n}"),
    "text": lambda n: (f"the red box {n}", f"Red box {n}."),
}
SYMBOLIC = {"symbolic": lambda n: (f"{n}\\sqrt{{12}}", f"{2 * n}\\sqrt{{3}}")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=2000, help="answers per kind")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    seconds = {kind: _seconds(case, arguments.answers) for kind, case in SHORT.items()}
    symbolic = {kind: _seconds(case, arguments.answers // 20) for kind, case in SYMBOLIC.items()}
    result = {
        "benchmark": "verifier",
        "answers": arguments.answers,
        **provenance(),
        "verdicts_per_second": len(SHORT) * arguments.answers / sum(seconds.values()),
        "by_kind": {kind: arguments.answers / value for kind, value in seconds.items()},
        "symbolic_verdicts_per_second": {kind: arguments.answers // 20 / value for kind, value in symbolic.items()},
    }
    write(result, arguments.out)
    return 0


def _seconds(case: Callable[[int], tuple[str, str]], count: int) -> float:
    numbers = random.Random(1).sample(range(1, 100 * count), count)
    asked = [(*case(n), True) if i % 2 else (case(n)[0], case(n + 1)[1], False) for i, n in enumerate(numbers)]
    is_correct(*reversed(asked[0][:2]))  # starts the verifier's process
    start_time = time.perf_counter()
    verdicts = [is_correct(said, truth) for truth, said, _ in asked]
    seconds = time.perf_counter() - start_time
    if verdicts != [right for *_, right in asked]:
        wrong = asked[[v == r for v, (*_, r) in zip(verdicts, asked, strict=True)].index(False)]
        raise RuntimeError(f"a wrong verdict for {wrong}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
