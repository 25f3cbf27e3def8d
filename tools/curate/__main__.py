"""Turn a pool of prompts into the alignment set and the RLVR set (spec 1.2 to 1.4).

python -m tools.curate pool.parquet --out runs/curated \\
    --student-url http://localhost:8000/v1 --student-model sft --student-samples 16 \\
    --teacher-url https://api.example.com/v1 --teacher-model teacher --verifier-model teacher

The pool is parquet as for RLVR: prompts, images, answers, and demonstrations where it has them. The student answers
each prompt several times. Prompts it never solves, with a demonstration that is in the grammar, has the right answer
and passes an LLM's verification, become ``alignment.parquet``; those it solves sometimes become ``rlvr.parquet``.
Demonstrations the pool lacks are asked of the teacher.

Endpoints speak OpenAI's chat protocol (vLLM's server does); their key is read from the environment variable that
--student-key-variable or --teacher-key-variable names. Every answer is kept in ``responses.jsonl`` as it comes, with a
hash of what was asked: the same command goes on where it was stopped, and another model, temperature or prompt is asked
anew. A prompt that an endpoint refuses (too long, filtered) is dropped, nothing else stops for it. ``report.json`` says
what was dropped and why, and what the tokens cost.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import openai

from prism_megatron.data.dataset import read_pool
from tools.curate.curation import curate
from tools.curate.endpoint import Endpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    for role in ("student", "teacher"):
        parser.add_argument(f"--{role}-url", required=True)
        parser.add_argument(f"--{role}-model", required=True)
        parser.add_argument(f"--{role}-key-variable", default="OPENAI_API_KEY")
        parser.add_argument(f"--{role}-temperature", type=float, default=1.0)
        parser.add_argument(f"--{role}-price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"))
    parser.add_argument("--verifier-model", help="asked at the teacher's endpoint; without it nothing is verified")
    parser.add_argument("--student-samples", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--band", type=float, nargs=2, default=(0.2, 0.8), metavar=("LOW", "HIGH"))
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--retries", type=int, default=8)
    parser.add_argument("--timeout-seconds", type=float, default=600.0)
    args = parser.parse_args()
    student, teacher = (
        Endpoint(
            getattr(args, f"{role}_url"),
            getattr(args, f"{role}_model"),
            getattr(args, f"{role}_key_variable"),
            args.max_tokens,
            getattr(args, f"{role}_temperature"),
            *getattr(args, f"{role}_price"),
        )
        for role in ("student", "teacher")
    )
    verifier = replace(teacher, model=args.verifier_model, temperature=0.0) if args.verifier_model else None
    try:
        report = curate(
            read_pool(args.pool),
            args.out,
            student,
            teacher,
            verifier,
            samples=args.student_samples,
            band=tuple(args.band),
            workers=args.workers,
            client_of=lambda endpoint: endpoint.client(args.retries, args.timeout_seconds),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except openai.APIError as error:
        print(f"error: {error}; what was answered is kept, the same command goes on from there", file=sys.stderr)
        return 1
    print(
        f"alignment {report['alignment']}, rlvr {report['rlvr']} of {report['pool']}; {args.out}/report.json says why"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
