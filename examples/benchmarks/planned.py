"""Peak memory as `plan` predicts it beside that of a real run, at batch sizes 1, 4 and 8.

    python examples/benchmarks/planned.py MODEL [--tokens 128,512]

Two steps of LoRA with its defaults, rows of full length, loss on the second half of each. CPU seconds of the
prediction are those of all its rows together; bytes are MLX's peak allocation.
"""

import argparse
import time

from mlx_adapters import adapter, methods
from mlx_adapters.data.tokens import Example
from mlx_adapters.models import load
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.train.plan import candidates, predict_all

import mlx.core as mx  # isort: skip  (after mlx_adapters, which loads a fast BLAS)
import numpy as np  # isort: skip

SIZES = (1, 4, 8)


def measured(source: str, config: TrainConfig) -> int:
    """Peak bytes of a run on the whole model."""
    loaded = load.load(source)
    adapter.attach(loaded, methods.make("lora", {}))
    mx.eval(loaded.model.parameters())
    tokens = config.max_length or 0
    ids = np.random.default_rng(0).integers(0, 1000, (config.batch_size, tokens)).tolist()
    mx.reset_peak_memory()
    for _ in Run(loaded.model, [Example(row, tokens // 2) for row in ids], config=config):
        pass
    return mx.get_peak_memory()


def main() -> None:
    """Print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", default="128,512")
    arguments = parser.parse_args()
    print("| tokens | batch size | checkpointing | predicted MB | measured MB | off |")
    print("|---" * 6 + "|")
    for tokens in map(int, arguments.tokens.split(",")):
        configs = candidates(SIZES, max_length=tokens, steps=2, warmup=0)
        started = time.process_time()
        plans = list(
            predict_all(arguments.model, method=methods.make("lora", {}), configs=configs, check=True)
        )
        seconds = time.process_time() - started
        for plan, config in zip(plans, configs, strict=True):
            peak = measured(arguments.model, config)
            again = "yes" if plan.gradient_checkpointing else "no"
            told = f"{plan.peak / 1e6:.0f} | {peak / 1e6:.0f} | {plan.peak / peak - 1:+.1%}"
            print(f"| {tokens} | {plan.batch_size} | {again} | {told} |", flush=True)
        print(f"predicted in {seconds:.1f} CPU seconds")


if __name__ == "__main__":
    main()
