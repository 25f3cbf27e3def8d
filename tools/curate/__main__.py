"""Select the alignment set and the RLVR set from a pool of prompts (spec 1.2 to 1.4).

    python -m tools.curate pool.parquet --out runs/curated \\
        --student-url http://localhost:8000/v1 --student-model sft --student-samples 16 \\
        --teacher-url https://api.example.com/v1 --teacher-model teacher --verifier-model teacher

The pool is parquet as for RLVR: prompts, images, answers, and optionally demonstrations. The student answers each
prompt several times. Prompts that it never solves become ``alignment.parquet`` if they have a demonstration that is
well-formed, has the right answer and passes an LLM's verification; missing demonstrations are requested from the
teacher. Prompts that the student solves sometimes become ``rlvr.parquet``.

Endpoints have OpenAI's chat protocol, like vLLM's server. Their key is read from the environment variable named by
--student-key-variable or --teacher-key-variable. Every reply is saved to ``responses.jsonl`` when it arrives, with a
hash of its request: the same command continues an interrupted run, and another model, temperature or prompt is a new
request. A prompt that an endpoint refuses (too long, filtered) is dropped. ``report.json`` has the numbers and
reasons of what was dropped, and the cost of the tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import openai

from prism_megatron.data.dataset import read_pool
from prism_megatron.errors import UserError
from tools.curate.curation import Settings, curate
from tools.curate.endpoint import Endpoint, Requests


def main() -> int:
    """Run the command. A user error is one line on stderr and exit status 2, a failing endpoint status 1."""
    arguments = _parser().parse_args()
    student, teacher = (_endpoint(arguments, role) for role in ("student", "teacher"))
    verifier = None
    if arguments.verifier_model:
        verifier = replace(teacher, model=arguments.verifier_model, temperature=0.0)
    requests = Requests(arguments.workers, arguments.retries, arguments.timeout_seconds)
    settings = Settings(student, teacher, verifier, arguments.student_samples, tuple(arguments.band), requests)
    try:
        report = curate(read_pool(arguments.pool), arguments.out, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except openai.APIError as error:
        print(f"error: {error}; received replies are saved, the same command continues from there", file=sys.stderr)
        return 1
    counts = f"alignment {report['alignment']}, rlvr {report['rlvr']} of {report['pool']}"
    print(f"{counts}; {arguments.out}/report.json has the reasons")
    return 0


def _endpoint(arguments: argparse.Namespace, role: str) -> Endpoint:
    return Endpoint(
        getattr(arguments, f"{role}_url"),
        getattr(arguments, f"{role}_model"),
        getattr(arguments, f"{role}_key_variable"),
        arguments.max_tokens,
        getattr(arguments, f"{role}_temperature"),
        *getattr(arguments, f"{role}_price"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="parquet file of prompts")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for role in ("student", "teacher"):
        parser.add_argument(f"--{role}-url", required=True, help="address of the endpoint, up to /v1")
        parser.add_argument(f"--{role}-model", required=True, help="name of the model at the endpoint")
        parser.add_argument(f"--{role}-key-variable", default="OPENAI_API_KEY", help="environment variable of the key")
        parser.add_argument(f"--{role}-temperature", type=float, default=1.0)
        parser.add_argument(
            f"--{role}-price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="per million tokens"
        )
    parser.add_argument("--verifier-model", help="model at the teacher's endpoint; without it nothing is verified")
    parser.add_argument("--student-samples", type=int, default=16, help="responses per prompt")
    parser.add_argument("--max-tokens", type=int, default=8192, help="length limit of a reply")
    parser.add_argument(
        "--band", type=float, nargs=2, default=(0.2, 0.8), metavar=("LOW", "HIGH"), help="pass rates of RLVR prompts"
    )
    parser.add_argument("--workers", type=int, default=32, help="requests in flight")
    parser.add_argument("--retries", type=int, default=8, help="of a request that fails temporarily")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, help="of a request")
    return parser


if __name__ == "__main__":
    sys.exit(main())
