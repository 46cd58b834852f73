"""Damaged and hostile files for every reader: a valid one, changed by a seeded hand.

    python tests/support/fuzz.py [--reader NAME ...] [--count 100000] [--seed 0]

Each input is read as the command line reads it. It may be accepted or refused by one of our errors; anything
else is a fault: another exception, more than five seconds, memory beyond the file's, a file touched, code
run. A fault is printed with the number that makes it again (`--seed N --count 1`). `test_fuzz.py` runs a
thousand inputs for each reader.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from limits import Hung, forget_peak, limited, resident
from mutations import (
    bin_changed,
    bytes_changed,
    json_changed,
    lines_changed,
    safetensors_changed,
    yaml_changed,
)

from mlx_adapters.errors import AdaptersError

SECONDS = 5.0
ALLOWED = 96 << 20  # bytes whatever the file's size: Python's objects for its fields, MLX's and our caches
PYTHON = 32  # bytes for each of the file's: an empty list is two letters of JSON, and 64 bytes of Python's


# Readers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """`make` fills a folder, in which `file` is then changed; `read` reads the folder or the file."""

    file: str
    make: Callable[[Path], None]
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]


@cache
def models() -> Path:
    """A folder with a tiny llama."""
    from tiny import make_tiny

    root = Path(tempfile.mkdtemp(prefix="fuzz-models-"))
    return make_tiny("llama", root, num_hidden_layers=1, vocab_size=64, hidden_size=16, intermediate_size=16)


@cache
def loaded() -> Any:
    from mlx_adapters.models.load import load

    return load(models())


def model_folder(folder: Path) -> None:
    shutil.copytree(models(), folder, dirs_exist_ok=True)


def sharded(folder: Path) -> None:
    model_folder(folder)
    from mlx_adapters.files.weights import header

    names = header(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bin_folder(folder: Path) -> None:
    import mlx.core as mx

    from mlx_adapters.convert.torch_bin_write import write_bin

    write_bin(folder / "pytorch_model.bin", {"a": mx.zeros((3, 4)), "b": mx.ones((5,), dtype=mx.float16)})


def gguf_folder(folder: Path) -> None:
    from tiny_gguf import as_written, llama_weights, write_tiny

    write_tiny(folder / "a.gguf", as_written(llama_weights()))


def converted(source: Path) -> None:
    from mlx_adapters.convert.checkpoint import convert

    with tempfile.TemporaryDirectory() as scratch:
        convert(source, Path(scratch) / "out")


def tokenizer_read(folder: Path) -> None:
    """As `load` reads it, and a conversation written by its template."""
    from mlx_adapters.data.templates import prompt_for
    from mlx_adapters.models.load import read_tokenizer

    tokenizer = read_tokenizer(folder, {"eos_token_id": 1})
    tokenizer.encode("tom has 3 apples")
    if tokenizer.has_chat_template:
        prompt_for("tom", template="chat", tokenizer=tokenizer, phase="eval")


def chat_folder(folder: Path) -> None:
    model_folder(folder)
    file = folder / "tokenizer_config.json"
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


def rows_file(name: str) -> Callable[[Path], None]:
    rows = [{"instruction": f"Tom has {n} apples", "input": "", "output": f"{n}"} for n in range(6)]

    def make(folder: Path) -> None:
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text)

    return make


def rows_read(file: Path) -> None:
    from mlx_adapters.data.sources import load_rows
    from mlx_adapters.data.tokens import encode

    encode(load_rows(str(file)), loaded().tokenizer, template="alpaca", loss_on="completion")


def run_file(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "data: wordproblems\nmethod: lora\nsteps: 3\nlr: 1.0e-3\nset: {rank: 4}\n"
    )


def run_read(file: Path) -> None:
    from mlx_adapters.files.documents import read_options

    read_options(file, {"data", "method", "steps", "lr", "set"})


def study_file(folder: Path) -> None:
    (folder / "study.yaml").write_text(
        "name: a\nmodel: m\ndata: wordproblems\ntasks: wordproblems\nlimit: 3\n"
        "train: {steps: 3, lr: 1.0e-3}\nseeds: [0, 1]\n"
        "grid:\n  - {method: lora, set: {alpha: 16}, size: {rank: [2, 8]}, "
        "placement: {attn: {targets: q_proj}}}\n  - {method: prefix, lr: [0.01, 0.02]}\n"
    )


def study_read(file: Path) -> None:
    from mlx_adapters.study.grid import read

    read(file)


def adapter_folder(method: str, **fields: Any) -> Callable[[Path], None]:
    @cache
    def made() -> Path:
        from trained import make_adapter

        place = Path(tempfile.mkdtemp(prefix="fuzz-adapter-")) / method
        return make_adapter(models(), place, method, fields, seed=1)

    return lambda folder: shutil.copytree(made(), folder, dirs_exist_ok=True) and None


def adapter_read(folder: Path) -> None:
    from mlx_adapters.adapter import build

    build(loaded().model, "llama", folder, name="base")


def exported(method: str, format: str, **fields: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from mlx_adapters.convert.exchange import export

        with tempfile.TemporaryDirectory() as scratch:
            adapter_folder(method, **fields)(Path(scratch) / "a")
            folder.rmdir()
            export(Path(scratch) / "a", folder, format=format, base="owner/name")

    return make


def imported(folder: Path) -> None:
    from mlx_adapters.convert.exchange import import_adapter

    base = replace(loaded(), model=deepcopy(loaded().model))  # the adapter is put into it
    with tempfile.TemporaryDirectory() as scratch:
        import_adapter(folder, Path(scratch) / "out", loaded=base)


def report_file(folder: Path) -> None:
    record = {"task": "SVAMP", "index": 0, "item": "ab", "correct": True, "label": "3"}
    record |= {"prompt": "a", "response": "b 3", "extracted": "3"}
    lines = [{"model": "m", "task": "SVAMP"}, record, record | {"index": 1, "item": "cd"}]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def report_read(file: Path) -> None:
    from mlx_adapters.evaluate.records import read_report

    read_report(file)


def _training() -> tuple[Any, Any]:
    from mlx.optimizers import AdamW

    from mlx_adapters import adapter, methods
    from mlx_adapters.models import load as model

    network = model.load(models())
    adapter.attach(network, methods.make("lora", {"rank": 2}))
    optimizer = AdamW(learning_rate=1e-3)
    optimizer.init(network.model.trainable_parameters())
    return network.model, optimizer


_trained = cache(_training)


def checkpoint_folder(folder: Path) -> None:
    from mlx_adapters.train.checkpoint import save

    model, optimizer = _trained()
    for step in (1, 2):
        save(folder, model, optimizer, step=step, settings={"lr": 1}, progress={"best": 1.0}, keep=2)


def checkpoint_read(folder: Path) -> None:
    from mlx_adapters.train.checkpoint import restore

    model, optimizer = _trained()
    step, _ = restore(folder, model, optimizer, settings={"lr": 1})
    assert step in (1, 2)


STEP = "step-000002/"
READERS: dict[str, Reader] = {
    "safetensors": Reader("model.safetensors", model_folder, safetensors_changed, converted),
    "index": Reader("model.safetensors.index.json", sharded, json_changed, converted),
    "config": Reader("config.json", model_folder, json_changed, converted),
    "bin": Reader("pytorch_model.bin", bin_folder, bin_changed, lambda f: _read_bin(f / "pytorch_model.bin")),
    "gguf": Reader("a.gguf", gguf_folder, bytes_changed, lambda f: converted(f / "a.gguf")),
    "tokenizer": Reader("tokenizer.json", chat_folder, json_changed, tokenizer_read),
    "tokenizer_config": Reader("tokenizer_config.json", chat_folder, json_changed, tokenizer_read),
    "jsonl": Reader("a.jsonl", rows_file("a.jsonl"), lines_changed, lambda f: rows_read(f / "a.jsonl")),
    "json": Reader("a.json", rows_file("a.json"), json_changed, lambda f: rows_read(f / "a.json")),
    "run": Reader("run.yaml", run_file, yaml_changed, lambda f: run_read(f / "run.yaml")),
    "study": Reader("study.yaml", study_file, yaml_changed, lambda f: study_read(f / "study.yaml")),
    "adapter": Reader(
        "adapter_model.safetensors", adapter_folder("lora", rank=2), safetensors_changed, adapter_read
    ),
    "adapter_config": Reader(
        "mlx_adapters.json", adapter_folder("series", bottleneck_size=4), json_changed, adapter_read
    ),
    "peft": Reader("adapter_config.json", exported("lora", "peft", rank=2), json_changed, imported),
    "peft_weights": Reader(
        "adapter_model.safetensors", exported("lora", "peft", rank=2), safetensors_changed, imported
    ),
    "adapterhub": Reader(
        "adapter_config.json", exported("seq_bn", "adapterhub", bottleneck_size=4), json_changed, imported
    ),
    "llm_adapters": Reader(
        "adapter_config.json", exported("series", "llm-adapters", bottleneck_size=4), json_changed, imported
    ),
    "mlx_lm": Reader("adapter_config.json", exported("lora", "mlx-lm", rank=2), json_changed, imported),
    "report": Reader("eval.jsonl", report_file, lines_changed, lambda f: report_read(f / "eval.jsonl")),
    "checkpoint": Reader(STEP + "state.safetensors", checkpoint_folder, safetensors_changed, checkpoint_read),
    "checkpoint_facts": Reader(STEP + "state.json", checkpoint_folder, json_changed, checkpoint_read),
}


def _read_bin(file: Path) -> None:
    import mlx.core as mx

    from mlx_adapters.files.torch_bin import read_bin

    mx.eval([mx.array(array) for array in read_bin(file).values()])


# One attempt -----------------------------------------------------------------------------------------------


class Fuzzed:
    """A reader with its folder, made once; `attempt(number)` says what was wrong, if anything."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.reader, self.folder = name, READERS[name], root / name / "in"
        self.folder.mkdir(parents=True)
        self.reader.make(self.folder)
        self.file = self.folder / self.reader.file
        self.whole = self.file.read_bytes()
        self.reader.read(self.folder)  # it must be good, and what is loaded only once is loaded now
        self.accepted = 0

    def state(self) -> dict[str, tuple[int, int]]:
        """What lies around: names, sizes, times, in the folder and beside it."""
        around = [*self.folder.parent.rglob("*"), *Path().iterdir()]
        return {
            str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in around if file.is_file()
        }

    def attempt(self, number: int) -> str | None:
        import mlx.core as mx

        rng = random.Random(f"{self.name} {number}")
        changed = self.reader.change(self.whole, rng)
        self.file.write_bytes(changed)
        before = self.state()
        forget_peak()
        peak = resident()
        mx.reset_peak_memory()
        started = mx.get_active_memory()
        fault = None
        try:
            with limited(SECONDS):
                self.reader.read(self.folder)
            self.accepted += 1
        except AdaptersError as error:
            fault = self._said(str(error))
        except OSError as error:  # the command line prints it as a line, with the name of the file
            fault = None if error.filename else f"OSError without a file: {error}"
        except Hung:
            fault = f"took over {SECONDS:g} s"
        except BaseException as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        grown = max(mx.get_peak_memory() - started, resident() - peak)
        if fault is None and grown > ALLOWED + PYTHON * len(changed):
            fault = f"memory grew by {grown >> 20} MB for a file of {len(changed)} bytes"
        if fault is None and self.state() != before:
            fault = f"files changed: {sorted(set(self.state().items()) ^ set(before.items()))[:3]}"
        return fault

    def _said(self, message: str) -> str | None:
        """The error must name the file or its folder."""
        named = self.file.name in message or str(self.folder) in message
        return None if named else f"names no file: {message[:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", nargs="*", choices=READERS, default=list(READERS))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for name in options.reader:
            fuzzed, started, faults = Fuzzed(name, Path(scratch) / "fuzz"), time.perf_counter(), 0
            for number in range(options.seed, options.seed + options.count):
                if fault := fuzzed.attempt(number):
                    faults += 1
                    print(f"{name} {number}: {fault}", flush=True)
            took = time.perf_counter() - started
            print(
                f"{name}: {options.count} inputs, {fuzzed.accepted} read, {faults} faults, {took:.1f} s",
                flush=True,
            )
            failed |= faults > 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
