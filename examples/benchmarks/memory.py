"""Peak memory of a gradient at 4 x 1024 tokens and 49,152 words: the fused loss, and gradient checkpointing.

    python examples/benchmarks/memory.py [--plot memory.png]

Random llama models of the sizes of SmolLM2-135M with 1 to 4 blocks, LoRA rank 8, loss on every
token. `plain` computes all logits, as other trainers do; `fused` is ours; `checkpointed` computes each block
again in the backward pass as well. Bytes are MLX's peak allocation beyond the weights.
"""

import argparse
from pathlib import Path

from mlx_adapters import adapter, methods
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.tokens import Example
from mlx_adapters.train.loss import split_head
from mlx_adapters.train.recompute import Recompute
from mlx_adapters.train.step import value_and_grad

import mlx.core as mx  # isort: skip  (after mlx_adapters, which loads a fast BLAS)
import mlx.nn as nn  # isort: skip
import numpy as np  # isort: skip
from mlx_lm.models import llama  # isort: skip

ROWS, TIME, VOCABULARY, WIDTH = 4, 1024, 49152, 576
DEPTHS = (1, 2, 4)
KINDS = ("plain", "fused", "checkpointed")


def network(depth: int) -> nn.Module:
    """SmolLM2-135M's sizes, random, with `depth` blocks and LoRA."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=WIDTH,
        num_hidden_layers=depth,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    model = llama.Model(arguments)
    config = methods.make("lora", {"rank": 8, "targets": "all-linear"})
    adapter.attach(model, config)
    mx.eval(model.parameters())
    return model


def peak(kind: str, depth: int) -> int:
    """Bytes beyond what is there before, of one loss and its gradient."""
    model = network(depth)
    gradient = value_and_grad(model, None if kind == "plain" else split_head(model))
    if kind == "checkpointed":
        gradient = Recompute(model)(gradient)
    model.train()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, TIME + 1)).tolist()
    batch = make_batch([[Example(row, 1)] for row in ids], pad_id=0)
    mx.eval(batch.arrays)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(model.trainable_parameters(), ([], []), batch))
    return mx.get_peak_memory() - before


def main() -> None:
    """Measure every kind at every depth; print the table and what follows from it; draw it if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    found = {kind: [peak(kind, depth) for depth in DEPTHS] for kind in KINDS}
    print(f"{'MB at blocks':>14}" + "".join(f"{depth:9}" for depth in DEPTHS))
    for kind, values in found.items():
        print(f"{kind:>14}" + "".join(f"{value / 1e6:9.0f}" for value in values))
    logits, hidden = ROWS * TIME * VOCABULARY * 4, ROWS * TIME * WIDTH * 4
    saved = min(p - f for p, f in zip(found["plain"], found["fused"]))
    growth = (found["checkpointed"][-1] - found["checkpointed"][-2]) / (DEPTHS[-1] - DEPTHS[-2])
    print(f"\nfused saves {saved / 1e6:.0f} MB (the logits take {logits / 1e6:.0f} MB)")
    print(f"checkpointed grows by {growth / 1e6:.2f} MB a block (the hidden states: {hidden / 1e6:.2f} MB)")
    if options.plot:
        draw(found, options.plot)


def draw(found: dict[str, list[int]], file: Path) -> None:
    """The table as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (kind, values), colour in zip(found.items(), ("#c8501e", "#1f5fa8", "#2f8f5b")):
        axes.plot(DEPTHS, [value / 1e6 for value in values], marker="o", color=colour, label=kind)
    axes.set(xlabel="blocks", ylabel="MB beyond the weights", ylim=(0, None))
    axes.set_title(f"one gradient, {ROWS} x {TIME} tokens, {VOCABULARY:,} words")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
