"""Methods side by side: each learns the quickstart's task on its model, and a table compares them.

    mlx-adapters quickstart                  # makes quickstart/model
    python examples/03_compare_methods.py [--model DIR] [--dir compare] [--steps 55] [--method lora ...]

Every method gets the same rows in the same order; sizes and learning rates are in METHODS. On two cores a
method takes about three and a half minutes. With --dir of an earlier run, finished methods are not repeated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx_adapters as ma

# name -> (the method with its size, the peak learning rate)
METHODS = {
    "lora": (ma.LoRA(rank=8, alpha=16, targets="all-linear"), 2e-3),
    "dora": (ma.DoRA(rank=8, alpha=16, targets="all-linear"), 2e-3),
    "series": (ma.Series(bottleneck_size=32), 2e-3),
    "parallel": (ma.Parallel(bottleneck_size=32, targets="attn+mlp"), 2e-3),
    "prefix": (ma.Prefix(num_virtual_tokens=16), 3e-2),
}
ITEMS = 100
ROW = "{:<10} {:>10} {:>8} {:>9} {:>14} {:>7} {:>11}"


def main() -> None:
    """Measure the base model, train and measure each method, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="quickstart/model", help="hub id, folder or .gguf file")
    parser.add_argument("--dir", type=Path, default=Path("compare"))
    parser.add_argument("--steps", type=int, default=55)
    parser.add_argument("--method", choices=METHODS, action="append")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    model = ma.load(options.model)
    rows = []
    for name in ["base", *(options.method or METHODS)]:
        file = options.dir / f"{name}-{options.steps}.json"
        if not file.exists():
            print(f"{name} ...", flush=True)
            done = measure(model) if name == "base" else train(model, name, options.steps, options.dir)
            file.write_text(json.dumps(done, indent=2), encoding="utf-8")
        rows.append(row(name, json.loads(file.read_text(encoding="utf-8"))))
    print(ROW.format("method", "parameters", "correct", "accuracy", "95 % interval", "loss", "trained in"))
    print("\n".join(rows))


def train(model: ma.LanguageModel, name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train the method, and measure what was saved."""
    method, lr = METHODS[name]
    output = folder / f"{name}-{steps}"
    result = ma.train(model, "wordproblems", method, output=output, steps=steps, lr=lr, template="alpaca")
    done = {"parameters": result.trainable, "loss": result.loss, "seconds": result.seconds}
    return measure(model, output) | done


def measure(model: ma.LanguageModel, adapter: Path | None = None) -> dict[str, Any]:
    """Accuracy on generated test problems, none of which is a training row."""
    (score,) = ma.evaluate(
        model, "wordproblems", adapter=adapter, template="alpaca", limit=ITEMS, seed=1, max_tokens=64
    ).scores
    return {"correct": score.correct, "total": score.total, "low": score.low, "high": score.high}


def row(name: str, done: dict[str, Any]) -> str:
    """One line of the table."""
    facts = [f"{done['correct']}/{done['total']}", f"{done['correct'] / done['total']:.0%}"]
    facts.append(f"{done['low']:.0%} - {done['high']:.0%}")
    if name == "base":
        return ROW.format(name, "", *facts, "", "")
    return ROW.format(
        name, f"{done['parameters']:,}", *facts, f"{done['loss']:.3f}", f"{done['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
