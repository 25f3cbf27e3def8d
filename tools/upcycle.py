"""Upcycle a dense Qwen3-VL to a discriminator: experts with noise, router, score heads (spec 3.1, 3.2).

    python -m tools.upcycle --hf DIR --out DIR --num-experts 4 --top-k 2 [--noise-std X --noise relative|absolute]

Prints the language-model loss of --text before and after, in nats per token, which rises if the experts differ too much
from the dense model. --init-score-head instead adds missing score heads to an upcycled checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from prism_megatron.config import DiscriminatorConfig
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes, check_num_experts, read_sizes

if TYPE_CHECKING:
    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.transfer import TensorSource

_TEXT = """A lighthouse is a tower with a bright light at the top, built to guide ships at night and in fog. Its keeper
used to climb the stairs every evening to light the lamp; today most of them are automatic and nobody lives there."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit status 2."""
    args = _parser().parse_args(arguments)
    try:
        text = args.text.read_text() if args.text else _TEXT
        before = language_model_loss(args.hf, text)
        upcycle(args)
        after = language_model_loss(args.out, text)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"out": str(args.out), "loss_before": before, "loss_after": after, "noise_std": args.noise_std}))
    return 0


def upcycle(args: argparse.Namespace) -> None:
    """Write the discriminator's HF directory (spec 8.2), in the dense model's dtype except for the score heads."""
    import torch

    from prism_megatron.convert.hf_io import HFWeights, save_hf
    from prism_megatron.convert.qwen3_vl import discriminator_table
    from prism_megatron.convert.rules import SCORE_HEAD
    from prism_megatron.convert.transfer import check_source

    sizes = read_sizes(args.hf)
    settings = DiscriminatorConfig(
        hf_checkpoint=str(args.hf),
        num_experts=args.num_experts,
        topk=args.top_k,
        experts=args.experts,
        upcycle_noise=args.noise_std,
        load_balance_coeff=args.load_balance_coeff,
    )
    settings.check("")
    check_num_experts(settings, sizes)
    if args.out.exists():
        raise UserError(f"{args.out} exists; remove it or give another --out")
    heads = 2 if args.experts == "dedicated" else 1
    with HFWeights(args.hf) as weights:
        source, changes = _source(args, weights, sizes, settings, heads)
        table = discriminator_table(sizes, args.num_experts, heads)
        check_source(table, source)
        dtype = weights.lazy("model.language_model.norm.weight").dtype
        names = list(dict.fromkeys(name for rule in table for name in rule.hf))
        dtypes = dict.fromkeys(names, dtype) | {SCORE_HEAD: torch.float32}
        shapes = {name: (tuple(source.lazy(name).shape), dtypes[name]) for name in names}
        tensors = ((name, source[name].to(dtypes[name])) for name in names)
        save_hf(args.out, shapes, tensors, args.hf, changes)


def _source(
    args: argparse.Namespace, weights: HFWeights, sizes: HFSizes, settings: DiscriminatorConfig, heads: int
) -> tuple[TensorSource, dict[str, object]]:
    from prism_megatron.convert.upcycle import UpcycledWeights, WithScoreHead, upcycled_config

    if sizes.num_experts is None:
        if args.init_score_head:
            raise UserError(f"{args.hf} is dense: it gets score heads with its experts, without --init-score-head")
        changes = upcycled_config(sizes, args.num_experts, args.top_k, args.load_balance_coeff)
        return UpcycledWeights(weights, sizes, settings, args.seed, args.noise), dict(changes)
    if not args.init_score_head:
        raise UserError(f"{args.hf} has experts already; --init-score-head gives it the score heads it may lack")
    return WithScoreHead(weights, heads, sizes.text["hidden_size"], args.seed), {}


def language_model_loss(directory: Path, text: str) -> float:
    """Return the mean cross-entropy of the text's tokens in nats, by transformers in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils import logging

    read_sizes(directory)
    logging.set_verbosity_error()  # it would warn of the unused score heads
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    if ids.shape[1] < 2:
        raise UserError("--text must be at least two tokens long")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="directory of the dense HF checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--num-experts", type=int, required=True)
    parser.add_argument("--top-k", type=int, required=True, help="experts per token")
    parser.add_argument(
        "--experts", choices=("dedicated", "shared"), default="dedicated", help="two score heads or one"
    )
    parser.add_argument("--noise-std", type=float, default=0.0, help="standard deviation of the experts' noise")
    parser.add_argument(
        "--noise",
        choices=("relative", "absolute"),
        default="relative",
        help="to each weight's own deviation, or absolute",
    )
    parser.add_argument("--load-balance-coeff", type=float, default=0.0, help="kept in config.json")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", type=Path, help="file of the text whose loss is measured")
    parser.add_argument(
        "--init-score-head", action="store_true", help="--hf is upcycled and lacks score heads: make them"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
