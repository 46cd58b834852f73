"""Memory and time of training on a file of millions of rows: the first start, and the second.

    python examples/benchmarks/large_data.py [--rows 2000000]

A JSONL file of short rows is made, then trained on for a few steps by a tiny random llama, each run in a
process of its own: 100 rows, all rows for the first time, and all rows again. Printed is what each run's
memory rises to above that of the run on 100 rows (the largest resident set, as the kernel counts it), and the
seconds until the first step begins.
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

STEPS = 5
WORDS = ["the", "box", "of", "a", "red", "car", "and", "dog", "was", "in", "my", "old", "house", "by", "sea"]


def write(file: Path, rows: int) -> None:
    """`rows` different questions of about 15 words, each with an answer."""
    phrases = [
        " ".join(WORDS[(start + step) % len(WORDS)] for step in range(9)) for start in range(len(WORDS))
    ]
    with file.open("w") as stream:
        for number in range(rows):
            question = f"{number}: {phrases[number % len(phrases)]}, how many are there?"
            stream.write(f'{{"instruction": "{question}", "output": "it is {number % 97}"}}\n')


def model(folder: Path) -> None:
    """A llama of two layers with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(pieces), max_position_embeddings=512, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def train(folder: Path, data: Path, output: Path) -> None:
    """Train in this process, and print what it took as JSON."""
    import mlx_adapters as ma

    class Told(ma.Callback):
        """Says how far it is."""

        def on_tokens(self, done: int, rows: int) -> None:
            if done % (rows // 10 + 1) < 1000:
                print(f"tokenized {done:,} of {rows:,}", file=sys.stderr)

    started = time.perf_counter()
    options = {"steps": STEPS, "template": "plain", "callbacks": [Told()]}
    trainer = ma.Trainer(ma.load(folder), str(data), "lora", output=output, **options)
    ready = time.perf_counter() - started
    losses = [step.loss for step in trainer]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"seconds": ready, "bytes": peak, "losses": losses, "rows": len(trainer.run.examples)}
    print(json.dumps(found | {"notes": trainer.notes}))


def measure(folder: Path, data: Path, name: str) -> dict:
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--run", str(folder / "model"), str(data), str(folder / name)]
    environment = {**os.environ, "MLX_ADAPTERS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--run", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        train(*options.run)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model(folder / "model")
        write(folder / "few.jsonl", 100)
        write(folder / "many.jsonl", options.rows)
        print(f"{options.rows:,} rows, {(folder / 'many.jsonl').stat().st_size / 1e6:.0f} MB")
        few = measure(folder, folder / "few.jsonl", "few")
        for name in ("first start", "second start"):
            found = measure(folder, folder / "many.jsonl", name)
            more = (found["bytes"] - few["bytes"]) / 1e6
            print(f"{name}: {found['rows']:,} examples, {found['seconds']:.1f} s until the first step")
            print(f"    {more:.0f} MB above 100 rows ({few['bytes'] / 1e6:.0f} MB)")
            print(f"    losses {found['losses']}")
            for note in found["notes"]:
                print(f"    {note}")


if __name__ == "__main__":
    main()
