"""Training on long rows: tokens a second, CPU time and memory, ours against torch + PEFT.

    python examples/benchmarks/long_rows.py [--model FOLDER] [--length 512 ...] [--steps 2] [--busy]

SmolLM2-135M, LoRA rank 8 on all linear layers, AdamW, one row a step, the loss on all of its tokens. Each
contender runs alone, in a process of its own; the first step is warm-up, memory is the peak of the process.
Ratios within one run are what counts, and they are printed only where the machine was idle when the run began
(load at most 0.3): contenders that share cores with anything else lose far more than their share. `--busy`
prints them all the same; CPU seconds are then the better measure, with one thread (OPENBLAS_NUM_THREADS=1
OMP_NUM_THREADS=1), because threads that wait for each other count as computing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training import ALPHA, LINEARS, LR, RANK, embedded, peak

LENGTHS = (512, 1024, 2048, 4096, 8192)
IDLE = 0.3  # load at which a run is alone on the machine
Rows = list[list[int]]


def make_rows(model: Path, length: int, count: int) -> Rows:
    """Rows of word problems, one after the other until a row is full."""
    from mlx_adapters.data.sources import Rows as Data
    from mlx_adapters.data.tokens import encode
    from mlx_adapters.data.wordproblems import generate
    from mlx_adapters.models import load as models

    tokenizer = models.load(model, lazy=True).tokenizer
    data = Data(generate(1 + length * count // 60), "instruction", "word problems")
    examples = encode(data, tokenizer, template="alpaca", loss_on="all").examples
    tokens = [token for example in examples for token in example.ids]
    return [tokens[first : first + length] for first in range(0, length * count, length)]


def ours(folder: Path, rows: Rows, *, again: bool = False) -> list[dict[str, float]]:
    """Through the public API, the way `mlx-adapters train` goes; `again` is gradient checkpointing."""
    from mlx_adapters import adapter, methods
    from mlx_adapters.data.tokens import Example
    from mlx_adapters.models import load as model
    from mlx_adapters.train.config import TrainConfig
    from mlx_adapters.train.loop import Run

    import mlx.core as mx  # isort: skip  (after mlx_adapters, which loads a fast BLAS)

    loaded = model.load(folder)
    mx.random.seed(0)
    adapter.attach(loaded, methods.make("lora", {"rank": RANK, "alpha": ALPHA, "targets": "all-linear"}))
    settings = TrainConfig(
        steps=len(rows), batch_size=1, lr=LR, warmup=0, schedule="constant", gradient_checkpointing=again
    )
    examples = [Example(row, 1) for row in rows]

    class AsGiven(Run):
        def _order(self, epoch: int) -> list[list[list[int]]]:
            return [[[row]] for row in range(len(examples))]

    steps, before = [], cpu()
    for step in AsGiven(loaded.model, examples, config=settings):
        steps.append({"seconds": step.seconds, "cpu": cpu() - before, "loss": step.loss})
        before = cpu()
    return steps


def checkpointing(folder: Path, rows: Rows) -> list[dict[str, float]]:
    """As `train --gradient-checkpointing`."""
    return ours(folder, rows, again=True)


def torch_peft(folder: Path, rows: Rows, *, half: bool = False) -> list[dict[str, float]]:
    """transformers + PEFT on the CPU, the loss by the model's `labels`, as their users train."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    kind = torch.bfloat16 if half else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(LINEARS), task_type="CAUSAL_LM")
    network = get_peft_model(base, config).train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    steps = []
    for row in rows:
        started, before = time.perf_counter(), cpu()
        ids = torch.tensor([row])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        steps.append({"seconds": seconds, "cpu": cpu() - before, "loss": loss.item()})
    return steps


def torch_half(folder: Path, rows: Rows) -> list[dict[str, float]]:
    """The same with weights and products in bfloat16."""
    return torch_peft(folder, rows, half=True)


def cpu() -> float:
    """Seconds of CPU time of this process, all threads."""
    return sum(os.times()[:2])


CONTENDERS = {
    "ours": ours,
    "ours, checkpointing": checkpointing,
    "torch float32": torch_peft,
    "torch bfloat16": torch_half,
}


def main() -> None:
    """Run every contender on every length and print the table, or one of them and print its JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="float32 folder; by default the embedded model")
    parser.add_argument("--length", type=int, action="append", help="tokens of a row; may be repeated")
    parser.add_argument("--steps", type=int, default=2, help="measured steps, after one for warm-up")
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="may be repeated")
    parser.add_argument("--limit", type=int, default=900, help="seconds after which a contender is stopped")
    parser.add_argument("--busy", action="store_true", help="print ratios although the machine is not idle")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        steps = CONTENDERS[options.worker](options.model, json.loads(options.rows.read_text()))
        print(json.dumps({"memory": peak(), "steps": steps}), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        report(options, Path(scratch))


def report(options: argparse.Namespace, scratch: Path) -> None:
    """Run the contenders one after the other, print the table and, on an idle machine, the ratios."""
    load = os.getloadavg()[0]
    folder = options.model or embedded(scratch)
    print(f"{processor()}, {os.cpu_count()} CPUs, load {load:.2f} at the start\n")
    print(f"{'tokens':>6}  {'':20} {'tokens/s':>9} {'CPU s/step':>11} {'peak GB':>8}   loss")
    results: dict[tuple[str, int], dict[str, float]] = {}
    for length in options.length or LENGTHS:
        file = scratch / "rows.json"
        file.write_text(json.dumps(make_rows(folder, length, 1 + options.steps)))
        for name in options.only or CONTENDERS:
            found = measured(name, folder, file, length, options.limit)
            if found:
                results[name, length] = found
    if load > IDLE and not options.busy:
        print(f"\nno ratios: the load was {load:.2f}, and they mean nothing above {IDLE} (--busy insists)")
        return
    ratios(results)


def measured(name: str, folder: Path, rows: Path, length: int, limit: int) -> dict[str, float]:
    """Tokens and CPU seconds of a step, and the peak memory, of one contender; prints its row. Empty where it
    did not end."""
    command = [sys.executable, __file__, "--worker", name, "--model", str(folder), "--rows", str(rows)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{length:6}  {name:20} nothing in {limit} seconds", flush=True)
        return {}
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        print(f"{length:6}  {name:20} ended with {done.returncode}: {last[:80]}", flush=True)
        return {}
    outcome: dict[str, Any] = json.loads(found[-1])
    steps = outcome["steps"][1:] or outcome["steps"]
    speed = length * len(steps) / sum(step["seconds"] for step in steps)
    seconds = sum(step["cpu"] for step in steps) / len(steps)
    losses = " -> ".join(f"{step['loss']:.4f}" for step in outcome["steps"])
    print(
        f"{length:6}  {name:20} {speed:9.1f} {seconds:11.2f} {outcome['memory'] / 1e9:8.2f}   {losses}",
        flush=True,
    )
    return {"speed": speed, "cpu": seconds, "memory": outcome["memory"]}


def ratios(results: dict[tuple[str, int], dict[str, float]]) -> None:
    """Ours against each of the others, by length."""
    print()
    for (name, length), found in results.items():
        for other in ("torch float32", "torch bfloat16"):
            peer = results.get((other, length))
            if peer and name.startswith("ours"):
                speed, work = found["speed"] / peer["speed"], peer["cpu"] / found["cpu"]
                memory = found["memory"] / peer["memory"]
                print(
                    f"{length:6}  {name} / {other}: speed {speed:.2f}, by CPU time {work:.2f}, "
                    f"memory {memory:.2f}"
                )


def processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return sys.platform
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else sys.platform


if __name__ == "__main__":
    main()
