"""Write the built-in visual task's data files (see prism_megatron/data/shapes.py).

python tools/make_shapes_data.py --out runs/shapes_data
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from prism_megatron.data.shapes import ShapesConfig, write_shapes_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for field in fields(ShapesConfig):
        several = {"nargs": len(field.default)} if isinstance(field.default, tuple) else {}
        kind = type(field.default[0]) if several else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, **several)
    args = vars(parser.parse_args())
    out = args.pop("out")
    config = ShapesConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in args.items()})
    write_shapes_data(out, config)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
