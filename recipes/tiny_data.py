"""Write the data of the built-in visual task (prism_megatron/data/shapes.py).

python -m recipes.tiny_data --out runs/tiny/data
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from prism_megatron.errors import UserError


def load_config(path: Path) -> ShapesConfig:
    """Read a ShapesConfig from a JSON object of the fields that differ from its defaults."""
    values: dict[str, Any] = json.loads(path.read_text())
    unknown = sorted(set(values) - {field.name for field in fields(ShapesConfig)})
    if unknown:
        raise UserError(f"{path}: unknown key(s) {unknown}; known: {[field.name for field in fields(ShapesConfig)]}")
    changed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return replace(ShapesConfig(), **changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--config", type=Path, help="JSON object of ShapesConfig fields")
    args = parser.parse_args()
    write_shapes_data(args.out, load_config(args.config) if args.config else ShapesConfig())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
