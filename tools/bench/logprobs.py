"""Benchmark the log-probabilities of one long response, in chunks of tokens and with all logits at once.

    python -m tools.bench.logprobs --tokens 8192

Each way runs forward and backward in its own process; peaks are resident memory beyond the inputs.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

from tools.processes import run_module

QWEN_VOCABULARY = 151_936


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=QWEN_VOCABULARY)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--way", choices=["chunked", "whole"], help="measure this way in this process")
    arguments = parser.parse_args()
    sizes = (arguments.tokens, arguments.vocabulary, arguments.hidden)
    if arguments.way:
        print(json.dumps(measure(arguments.way, *sizes)))
        return 0
    result: dict[str, object] = dict(zip(("tokens", "vocabulary", "hidden"), sizes, strict=True))
    for way in ("chunked", "whole"):
        numbers = [f"--{name}={value}" for name, value in result.items() if isinstance(value, int)]
        done = run_module("tools.bench.logprobs", ["--way", way, *numbers])
        # All logits at once may not fit.
        result[way] = json.loads(done.output.splitlines()[-1]) if done.status == 0 else f"exit status {done.status}"
    print(json.dumps({"benchmark": "logprobs", **result}))
    return 0


def measure(way: str, tokens: int, vocabulary: int, hidden_size: int) -> dict[str, float]:
    """Return peak GiB beyond the inputs, and seconds, of one forward and backward pass."""
    import torch

    from prism_megatron.config import ParallelConfig
    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    from prism_megatron.model.logprobs import token_scores

    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size).mul_(hidden_size**-0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    before, start_time = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if way == "chunked":
        total = token_scores(hidden, weight, targets).logprobs.sum()
    else:
        total = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).sum()
    torch.autograd.backward(total)
    seconds = time.perf_counter() - start_time
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    groups.shutdown()
    return {"peak_gib": round(peak / 2**20, 3), "seconds": round(seconds, 2)}


if __name__ == "__main__":
    sys.exit(main())
