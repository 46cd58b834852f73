"""Throughput of answering: ours in one and two processes, transformers at its best, and the seed's way.

    python examples/benchmarks/generation.py [--model FOLDER] [--data-dir DIR] [--limit 256] [--tokens 64]

The first SVAMP prompts in the Alpaca template (generated word problems without --data-dir), 64 new tokens
each, no end token, SmolLM2-135M in float32, greedy. transformers decodes left-padded batches of neighbours in
length, with its cache. The seed's evaluate.py takes one prompt at a time with use_cache=False; a few prompts
are enough to know its speed (it also takes four beams, which would make it four times slower). Each contender
runs alone, one warm-up batch before; two processes share the prompts and the cores, as `eval` does on a CPU.
Promised: 1.5 times transformers.generate as it is usually called, in one process, and 10 times the seed's
way. Run it on an idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from training import embedded

from mlx_adapters.cpu.cores import share

SEED_PROMPTS = 3  # the seed's way is so slow that more of them would only take time
OURS, HUGGING_FACE, SEED = "ours", "transformers.generate", "seed's way (no cache)"


def ours(folder: Path, prompts: list[list[int]], tokens: int, batch: int) -> float:
    """Seconds of our decoder."""
    from mlx_adapters.generate.decode import generate_ids
    from mlx_adapters.models import load as model

    network = model.load(folder, answering=True).model

    def answer(some: Sequence[Sequence[int]], count: int) -> int:
        done = generate_ids(network, some, stop=frozenset(), max_tokens=count, batch_size=batch)
        return sum(len(ids) for _, ids in done)

    answer(prompts[:batch], 4)
    started = time.perf_counter()
    assert answer(prompts, tokens) == tokens * len(prompts)
    return time.perf_counter() - started


def transformers(folder: Path, prompts: list[list[int]], tokens: int, batch: int) -> float:
    """Seconds of transformers.generate, cached and batched."""
    return _torch(folder, prompts, tokens, batch, cached=True)


def seeds_way(folder: Path, prompts: list[list[int]], tokens: int, batch: int) -> float:
    """Seconds for all prompts one by one without a cache, measured on the middle few of them."""
    middle = sorted(prompts, key=len)[len(prompts) // 2 :][:SEED_PROMPTS]
    return _torch(folder, middle, tokens, 1, cached=False) * len(prompts) / len(middle)


def _torch(folder: Path, prompts: list[list[int]], tokens: int, batch: int, *, cached: bool) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None
    rows = sorted(prompts, key=len, reverse=True)

    def answer(some: list[list[int]], count: int) -> int:
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in some])
        with torch.inference_mode():
            out = network.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                use_cache=cached,
                pad_token_id=0,
            )
        return int(out[:, longest:].numel())

    answer(rows[:batch], 2)
    started = time.perf_counter()
    done = sum(answer(rows[i : i + batch], tokens) for i in range(0, len(rows), batch))
    assert done == tokens * len(prompts)
    return time.perf_counter() - started


CONTENDERS = {OURS: ours, HUGGING_FACE: transformers, SEED: seeds_way}


def main() -> None:
    """Run every contender and print the table, or one of them and print its seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="float32 folder; by default the embedded model")
    parser.add_argument("--data-dir", type=Path, help="folder with SVAMP/test.json")
    parser.add_argument("--limit", type=int, default=256, help="prompts")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each")
    parser.add_argument("--ours", default="32,64,128", help="our batch sizes")
    parser.add_argument("--theirs", default="32,64,128", help="batch sizes of transformers; the best counts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        prompts = json.loads(options.prompts.read_text())
        print(CONTENDERS[options.worker](options.model, prompts, options.tokens, options.batch))
        return
    with tempfile.TemporaryDirectory() as scratch:
        report(options, Path(scratch))


def report(options: argparse.Namespace, scratch: Path) -> None:
    """Encode the prompts once, run the contenders one after the other, print tokens a second and ratios."""
    folder = options.model or embedded(scratch)
    count, length = write_prompts(options, folder, scratch / "prompts.json")
    print(f"{count} prompts of {length:.0f} tokens, {options.tokens} new ones, {os.cpu_count()} CPUs\n")
    print(f"{'':24} {'processes':>9} {'batch':>5} {'seconds':>8} {'new tokens/s':>12}")
    best: dict[tuple[str, int], float] = {}
    for name, sizes in ((OURS, options.ours), (HUGGING_FACE, options.theirs), (SEED, "1")):
        for processes in (1, 2) if name != SEED else (1,):
            for batch in map(int, sizes.split(",")):
                prompts = scratch / "prompts.json"
                seconds = run(name, batch, folder, options.tokens, prompts, processes)
                speed = count * options.tokens / seconds
                best[name, processes] = max(best.get((name, processes), 0.0), speed)
                print(f"{name:24} {processes:9} {batch:5} {seconds:8.1f} {speed:12.1f}", flush=True)
    print("\nours, at the best batch size of each:")
    for (name, processes), speed in best.items():
        if name != OURS:
            ratios = " and ".join(f"{best[OURS, n] / speed:.2f}" for n in (1, 2))
            print(f"  {ratios} times {name} in {processes}, with 1 and 2 processes")


def write_prompts(options: argparse.Namespace, folder: Path, file: Path) -> tuple[int, float]:
    """Write the prompts' token ids; (how many, tokens of one on average)."""
    from mlx_lm.utils import load_tokenizer

    from mlx_adapters.data.templates import prompt_for
    from mlx_adapters.data.tokens import prompt_ids
    from mlx_adapters.evaluate.tasks import load_items

    name = "SVAMP" if options.data_dir else "wordproblems"
    items = load_items(name, data_dir=options.data_dir, limit=None if options.data_dir else options.limit)
    tokenizer = load_tokenizer(folder)
    texts = [
        prompt_for(item.instruction, item.input, template="alpaca", tokenizer=tokenizer, phase="eval")
        for item in items[: options.limit]
    ]
    rows = [prompt_ids(text, tokenizer) for text in texts]
    file.write_text(json.dumps(rows))
    return len(rows), sum(map(len, rows)) / len(rows)


def run(name: str, batch: int, folder: Path, tokens: int, prompts: Path, processes: int) -> float:
    """Seconds of one contender in so many processes, each with its part of the prompts and of the cores."""
    rows, running = json.loads(prompts.read_text()), []
    for rank in range(processes):
        part = prompts.with_name(f"part-{rank}.json")
        part.write_text(json.dumps(rows[rank::processes]))
        shared = share(processes)
        shared["OMP_NUM_THREADS"] = shared["OPENBLAS_NUM_THREADS"]  # torch's
        running.append(start(name, batch, folder, tokens, part, shared if processes > 1 else {}))
    return max(finish(name, one) for one in running)


def start(
    name: str, batch: int, folder: Path, tokens: int, prompts: Path, environment: dict[str, str]
) -> "subprocess.Popen[str]":
    """The process of one contender; the last line of its output is its seconds."""
    command = [sys.executable, __file__, "--worker", name, "--batch", str(batch), "--model", str(folder)]
    command += ["--tokens", str(tokens), "--prompts", str(prompts)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)


def finish(name: str, process: "subprocess.Popen[str]") -> float:
    """Its seconds, when it is done."""
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{errors[-2000:]}")
    return float(output.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
