"""Check numerics, FP8 and speed on one GPU, in under 8 minutes, and write one JSON file.

    python -m tools.gpu_check --out gpu_check.json [--only parity,fp8] [--layers 36] [--dry]

Each part runs in its own process with a time limit. A part that fails or hangs is recorded with its error, the others
run, and the exit status is 1. A GPU that is too small for the full 4B-shaped model trains fewer layers, with a note.
``--dry`` runs the same steps on tiny sizes in the precisions of a CPU, and lists the rest. The command needs torch,
transformers, megatron-core and, on a GPU, Transformer Engine. Parts:

    names          import and export of every HF tensor, grouped experts included, bit by bit
    parity         BF16 against float32 HF on a tiny and a two-layer model of 4B's widths, with images and gradients
    fp8            50 steps in BF16 and in each FP8 recipe from the same start: loss, gradient norm, KL divergence
    train          steps of a 4B-shaped model on images of real sizes, BF16 and each FP8 recipe, layers recomputed
    train_hf       the same rows in HF transformers with torch's AdamW and gradient checkpointing
    discriminator  scoring, packed and one sequence at a time
    sync           weight sync to vLLM, if it is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from tools.gpu_check.parts import SECONDS, Options, check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="JSON file, written after each part")
    parser.add_argument("--only", default=",".join(SECONDS), help="parts to run, separated by commas")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers of the timed parts; 0: as many as fit")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--commit", help="commit to record if there is no git repository")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := [part for part in parts if part not in SECONDS]:
        print(f"error: no part {', '.join(unknown)}; there are {', '.join(SECONDS)}", file=sys.stderr)
        return 2
    import torch

    if not arguments.dry and (not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None):
        print("error: this needs a GPU and Transformer Engine; --dry runs tiny sizes without them", file=sys.stderr)
        return 2
    return check(parts, Options(arguments.out, arguments.dry, arguments.layers, arguments.commit))


if __name__ == "__main__":
    sys.exit(main())
