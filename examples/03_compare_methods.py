"""Methods side by side: each learns the quickstart's task on the embedded model, and a table compares them.

    python examples/03_compare_methods.py [--dir compare] [--steps 55] [--method lora --method prefix ...]

The base is converted and measured once. Every method gets the same rows in the same order; rates and sizes
are in SETTINGS. On two cores a method takes about three and a half minutes. With --dir of an earlier run,
methods that are done are not run again.
"""

import argparse
from pathlib import Path
from typing import Any

from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.models.embedded import embedded_model
from mlx_adapters.study.run import study

# method -> (its fields, peak learning rate)
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"rank": 8, "alpha": 16, "targets": "all-linear"}, 2e-3),
    "dora": ({"rank": 8, "alpha": 16, "targets": "all-linear"}, 2e-3),
    "series": ({"bottleneck_size": 32}, 2e-3),
    "parallel": ({"bottleneck_size": 32, "targets": "attn+mlp"}, 2e-3),
    "prefix": ({"num_virtual_tokens": 16}, 3e-2),
}


def main() -> None:
    """Convert, then a study of one cell per method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("compare"))
    parser.add_argument("--steps", type=int, default=55)
    parser.add_argument("--method", choices=SETTINGS, action="append")
    options = parser.parse_args()
    model, output = options.dir / "model", options.dir / f"{options.steps}-steps"
    if not model.exists():
        convert(embedded_model(), model)
    settings = {
        "name": "Methods side by side",
        "model": str(model),
        "limit": 100,
        "max_tokens": 64,
        "train": {"steps": options.steps, "template": "alpaca"},
        "grid": [
            {"method": name, "set": SETTINGS[name][0], "lr": SETTINGS[name][1]}
            for name in options.method or SETTINGS
        ],
    }
    for cell in study(settings, output):
        found = cell.get("error") or f"{cell['scores'][0]['accuracy']:.0%} right"
        print(f"{cell['id']}: {found}", flush=True)
    print((output / "results.md").read_text())


if __name__ == "__main__":
    main()
