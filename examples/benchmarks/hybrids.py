"""A training step of a hybrid with linear attention: ours against mlx-lm's.

    python examples/benchmarks/hybrids.py [--tokens 1024] [--hidden 1024] [--stock]

A random qwen3_5 of 4 layers, three of linear attention and one of full attention, with the sizes of the 0.8B
release but for the vocabulary (8,192 words, so that the head does not decide). LoRA rank 8 on all linear
layers, AdamW, float32, one row, loss on every token. Each contender runs in a process of its own, one after
the other: ours as `mlx-adapters train` steps; mlx-lm's model, LoRA, loss and step with our BLAS in its place,
so that only the path differs; and with --stock mlx-lm as it comes (on Linux its BLAS is the slow one of the
wheel). Both see the same tokens. Seconds are those of the last step, CPU seconds those of all threads; memory
is MLX's peak in a step.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

ROWS = 1
VOCABULARY = 8192


def network(options: argparse.Namespace) -> Any:
    """The model, the same in every process."""
    import mlx.core as mx
    from mlx_lm.models import qwen3_5

    arguments = qwen3_5.TextModelArgs(
        model_type="qwen3_5",
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=4,
        full_attention_interval=4,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=options.hidden // 64,
        linear_num_value_heads=options.hidden // 64,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        num_experts=0,
    )
    mx.random.seed(0)
    model = qwen3_5.TextModel(arguments)
    mx.eval(model.parameters())
    return model


def tokens(options: argparse.Namespace) -> list[int]:
    """One row, and the target of its last token."""
    import numpy as np

    drawn: list[int] = np.random.default_rng(0).integers(0, VOCABULARY, options.tokens + 1).tolist()
    return drawn


def ours(options: argparse.Namespace) -> list[dict[str, float]]:
    """Through the functions that `mlx-adapters train` runs for each step."""
    import mlx.optimizers as optim

    from mlx_adapters import adapter, methods
    from mlx_adapters.cpu.layers import speed_up
    from mlx_adapters.data.batches import make_batch
    from mlx_adapters.data.tokens import Example
    from mlx_adapters.train.loss import split_head
    from mlx_adapters.train.step import accumulate, make_update, train_step, value_and_grad

    model = network(options)
    adapter.attach(model, methods.make("lora", {"rank": 8, "targets": "all-linear"}), model_type="qwen3_5")
    speed_up(model)
    model.train()
    optimizer = optim.AdamW(learning_rate=1e-4)
    optimizer.init(model.trainable_parameters())
    gradient = accumulate(value_and_grad(model, split_head(model)))
    batch = make_batch([[Example(tokens(options), 1)]], pad_id=0)
    update = make_update(optimizer, 1.0)
    return measured(lambda: train_step(model, optimizer, gradient, update, [batch]).loss, options.steps)


def mlx_lm(options: argparse.Namespace) -> list[dict[str, float]]:
    """mlx-lm's layers, loss and step."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = network(options)
    model.freeze()
    linear_to_lora_layers(model, 4, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    model.train()
    optimizer = optim.AdamW(learning_rate=1e-4)
    ids, lengths = mx.array([tokens(options)]), mx.array([[0, options.tokens + 1]])
    gradient = nn.value_and_grad(model, default_loss)

    def step() -> float:
        (loss, _), gradients = gradient(model, ids, lengths)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state, loss)
        return float(loss)

    return measured(step, options.steps)


def measured(step: Any, steps: int) -> list[dict[str, float]]:
    """Loss, seconds, CPU seconds and peak bytes of each step."""
    import mlx.core as mx

    found = []
    for _ in range(steps):
        mx.reset_peak_memory()
        wall, processor = time.perf_counter(), time.process_time()
        loss = step()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        found.append({"loss": loss, "seconds": wall, "cpu": processor, "bytes": mx.get_peak_memory()})
    return found


CONTENDERS = {"ours": ours, "mlx-lm, our BLAS": mlx_lm, "mlx-lm": mlx_lm}


def main() -> None:
    """Run every contender, print the table and the ratios; or be one of them and print its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024, help="width; the other widths follow from it")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--stock", action="store_true", help="run mlx-lm with the BLAS of its wheel, too")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        if options.worker != "mlx-lm":
            import mlx_adapters.cpu.blas

            mlx_adapters.cpu.blas.load_fast_blas()
        print(json.dumps(CONTENDERS[options.worker](options)), flush=True)
        return
    names = [name for name in CONTENDERS if name != "mlx-lm" or options.stock]
    print(f"qwen3_5, width {options.hidden}, {options.tokens} tokens, {os.cpu_count()} CPUs\n")
    print(f"{'':18} {'seconds':>8} {'CPU s':>8} {'peak GB':>8}  loss")
    found = {}
    for name in names:
        command = [sys.executable, __file__, "--worker", name, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        steps = json.loads(done.stdout.splitlines()[-1])
        last = found[name] = steps[-1]
        losses = " -> ".join(f"{step['loss']:.4f}" for step in steps)
        size = last["bytes"] / 1e9
        print(f"{name:18} {last['seconds']:8.1f} {last['cpu']:8.1f} {size:8.2f}  {losses}", flush=True)
    print()
    for name in names[1:]:
        faster = found[name]["seconds"] / found["ours"]["seconds"]
        smaller = found["ours"]["bytes"] / found[name]["bytes"]
        print(f"ours is {faster:.1f} times as fast as {name}, in {smaller:.2f} of its memory")


if __name__ == "__main__":
    main()
