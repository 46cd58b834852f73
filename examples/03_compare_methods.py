"""Methods side by side: each learns the quickstart's task on the embedded model, and a table compares them.

    python examples/03_compare_methods.py [--dir compare] [--steps 55] [--method lora --method prefix ...]

The base is converted and measured once. Every method gets the same rows in the same order; rates and sizes
are in SETTINGS. On two cores a method takes about three and a half minutes. With --dir of an earlier run,
methods that are done are not run again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mlx_adapters import adapter, methods
from mlx_adapters.cli.eval import run_task
from mlx_adapters.cli.quickstart import source_of
from mlx_adapters.cli.screen import duration, table
from mlx_adapters.cli.train import describe, run
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.data import wordproblems
from mlx_adapters.data.sources import Rows
from mlx_adapters.evaluate import tasks
from mlx_adapters.models import load as model
from mlx_adapters.train.trainer import Trainer

# method -> (its fields, peak learning rate)
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"rank": 8, "alpha": 16, "targets": "all-linear"}, 2e-3),
    "dora": ({"rank": 8, "alpha": 16, "targets": "all-linear"}, 2e-3),
    "series": ({"bottleneck_size": 32}, 2e-3),
    "parallel": ({"bottleneck_size": 32, "targets": "attn+mlp"}, 2e-3),
    "prefix": ({"num_virtual_tokens": 16}, 3e-2),
}
ROWS, ITEMS = 2000, 100


def main() -> None:
    """Convert, measure, train, measure, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("compare"))
    parser.add_argument("--steps", type=int, default=55)
    parser.add_argument("--method", choices=SETTINGS, action="append")
    options = parser.parse_args()
    folder: Path = options.dir
    if not (folder / "model").exists():
        convert(source_of(None)[0], folder / "model")
    results = {"base": done(folder, "base", options.steps, lambda: base(folder))}
    for method in options.method or SETTINGS:
        results[method] = done(
            folder, method, options.steps, lambda m=method: trained(folder, m, options.steps)
        )
    table(
        ["method", "parameters", "correct", "accuracy", "95 % interval", "loss", "trained in"],
        [row(name, facts) for name, facts in results.items()],
    )


def done(folder: Path, name: str, steps: int, work: Any) -> dict[str, Any]:
    """What `work` finds, or found in an earlier run with as many steps."""
    file = folder / f"{name}-{steps}.json"
    if not file.exists():
        file.write_text(json.dumps(work(), indent=2))
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def base(folder: Path) -> dict[str, Any]:
    """Accuracy of the model as it comes."""
    return measure(model.load(folder / "model", answering=True))


def trained(folder: Path, method: str, steps: int) -> dict[str, Any]:
    """Train `method`, and measure what was saved on a freshly loaded base."""
    print(f"\n{method}", flush=True)
    fields, lr = SETTINGS[method]
    rows = Rows(wordproblems.generate(ROWS, seed=0), "instruction", "generated word problems")
    output = folder / f"{method}-{steps}"
    base, settings = model.load(folder / "model"), {"steps": steps, "lr": lr, "template": "alpaca"}
    trainer = Trainer(base, rows, methods.make(method, fields), output=output, **settings)
    describe(trainer)
    seconds = run(trainer)
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    loaded = model.load(folder / "model", answering=True)
    adapter.load(loaded, output)
    return measure(loaded) | {"parameters": trainer.trainable, "seconds": seconds, "loss": last}


def measure(loaded: model.LanguageModel) -> dict[str, Any]:
    """Accuracy on the quickstart's test problems, which no training row repeats."""
    items = tasks.load_items("wordproblems", data_dir=None, limit=ITEMS, seed=1)
    _, score, _ = run_task(
        loaded, items, "wordproblems", template="alpaca", batch_size=32, max_tokens=64, seen=frozenset()
    )
    return {"correct": score.correct, "total": score.total, "low": score.low, "high": score.high}


def row(name: str, facts: dict[str, Any]) -> list[str]:
    """One line of the table."""
    share = facts["correct"] / facts["total"]
    interval = f"{facts['low']:.0%} - {facts['high']:.0%}"
    cells = [f"{facts['correct']}/{facts['total']}", f"{share:.0%}", interval]
    if name == "base":
        return [name, "", *cells, "", ""]
    return [name, f"{facts['parameters']:,}", *cells, f"{facts['loss']:.3f}", duration(facts["seconds"])]


if __name__ == "__main__":
    main()
