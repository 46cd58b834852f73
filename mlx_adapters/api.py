"""The front door: what `import mlx_adapters as ma` offers, each a plain function over the package's modules.

A path may be `str` or `Path` everywhere. Errors are those of `mlx_adapters.errors`, one line each.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_adapters import adapter as adapters
from mlx_adapters.adapter.multi import activate, active, load_several, names, unload
from mlx_adapters.cpu.blas import cache
from mlx_adapters.models import load as models
from mlx_adapters.models.load import LanguageModel

PathLike = str | Path


def load(
    source: PathLike, *, bits: int | None = None, dtype: str | None = None, revision: str | None = None
) -> LanguageModel:
    """Load a base model with its tokenizer.

    With `bits`, or from a `.gguf` file, the checkpoint is converted once into the user's cache
    (`~/.cache/mlx-adapters/models`) and loaded from there; use `convert` to choose the folder.

    Args:
        source: A hub id, a folder (a Hugging Face checkpoint or one that `convert` wrote), or a `.gguf` file.
        bits: Quantize the linear layers and the embedding to so many bits per weight: 2, 3, 4, 6 or 8.
        dtype: `float32`, `float16` or `bfloat16` for what is not quantized. By default float32 on a CPU,
            where other types are many times slower, and the checkpoint's type on Metal.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The model, its tokenizer, its configuration and its folder.

    Raises:
        CheckpointError: The files are missing, damaged, or not a model.
        UnsupportedError: The architecture, or something that its configuration asks for, is not supported.
    """
    if bits is None and not str(source).endswith(".gguf"):
        return models.load(source, dtype=dtype, revision=revision)
    return models.load(_converted(source, bits, revision), dtype=dtype)


def _converted(source: PathLike, bits: int | None, revision: str | None) -> Path:
    """The folder in the cache that holds `source` with so many bits, written if it is not there yet."""
    from mlx_adapters.convert.checkpoint import convert

    path = Path(source)
    if not path.exists():
        path = models.locate(source, revision=revision)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    facts = "".join(f"{file.resolve()} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files)
    key = hashlib.sha256(f"{facts} {bits}".encode()).hexdigest()[:12]
    name = str(source).strip("/").replace("/", "--")[-80:]
    folder = cache() / "models" / f"{name}-{f'{bits}bit-' if bits else ''}{key}"
    if not (folder / "config.json").exists():
        convert(str(source), folder, bits=bits, revision=revision)
    return folder


@contextmanager
def _with_adapter(model: LanguageModel, folder: PathLike | None) -> Iterator[adapters.AdapterMeta | None]:
    """The model with the adapter in `folder`, which is loaded once and kept; bare again behind the block."""
    if folder is None:
        yield None
        return
    file = Path(folder) / adapters.WEIGHTS
    stamp = file.stat().st_mtime_ns if file.exists() else 0
    name = f"{Path(folder).resolve()}@{stamp}"
    if name not in names(model.model):
        load_several(model, {name: folder})
    before = active(model.model)
    activate(model.model, name)
    try:
        yield adapters.read_meta(Path(folder))
    finally:
        activate(model.model, before or None)


def generate(
    model: LanguageModel | PathLike,
    prompt: str,
    *,
    adapter: PathLike | None = None,
    template: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Answer one prompt."""
    from mlx_adapters.adapter.call import before_text, start_cache, with_virtual
    from mlx_adapters.data.templates import chosen_template, conversation
    from mlx_adapters.data.tokens import prompt_ids
    from mlx_adapters.generate.sampling import sampler
    from mlx_adapters.generate.stream import stream
    from mlx_adapters.models.limits import check_length

    loaded = _loaded(model)
    with _with_adapter(loaded, adapter) as meta:
        loaded.model.eval()
        name = chosen_template(
            template, meta.template if meta else None, loaded.template, tokenizer=loaded.tokenizer
        )
        turns = [{"role": "user", "content": prompt}]
        ids = prompt_ids(conversation(turns, template=name, tokenizer=loaded.tokenizer), loaded.tokenizer)
        row = with_virtual(loaded.model, ids, loaded.tokenizer)
        check_length(loaded.model, len(ids) + before_text(loaded.model), max_tokens)
        pieces = stream(
            loaded.model,
            loaded.tokenizer,
            row,
            prompt=ids,
            max_tokens=max_tokens,
            sampler=sampler(seed, temperature=temperature),
            cache=start_cache(loaded.model),
        )
        return "".join(piece.text for piece in pieces)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on one or more test sets."""

    scores: list[Any]
    records: list[Any]

    @property
    def accuracy(self) -> float:
        """The share of right answers among all items."""
        return sum(score.correct for score in self.scores) / sum(score.total for score in self.scores)


def evaluate(
    model: LanguageModel | PathLike,
    task: PathLike,
    *,
    adapter: PathLike | None = None,
    template: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> Evaluation:
    """Accuracy on a test set, or on a file of your own."""
    from mlx_adapters.data.templates import chosen_template
    from mlx_adapters.evaluate import score, tasks

    loaded = _loaded(model)
    records, scores = [], []
    with _with_adapter(loaded, adapter) as meta:
        loaded.model.eval()
        name = chosen_template(template, meta.template if meta else None, loaded.template)
        for row, items in tasks.load(str(task), limit=limit):
            seen = frozenset(meta.seen) if meta else frozenset()
            found = list(
                score.evaluate(
                    loaded.model, loaded.tokenizer, items, row, template=name, seen=seen, **options
                )
            )
            records += found
            scores.append(score.summarise(found))
    return Evaluation(scores, records)


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    adapter: Path
    loss: float
    steps: int
    seconds: float
    metrics: list[dict[str, Any]]


def train(
    model: LanguageModel | PathLike,
    data: PathLike | Sequence[Mapping[str, Any]],
    method: Any = "lora",
    *,
    output: PathLike,
    resume: bool = False,
    **options: Any,
) -> TrainResult:
    """Train an adapter to the end, and take it off the model again."""
    from mlx_adapters.data.sources import _checked, load_rows
    from mlx_adapters.train.config import TrainConfig
    from mlx_adapters.train.metrics import read
    from mlx_adapters.train.session import METRICS, prepare

    loaded = _loaded(model)
    rows = (
        load_rows(str(data))
        if isinstance(data, (str, Path))
        else _checked([(f"row {i}", dict(row)) for i, row in enumerate(data)], "the rows given")
    )
    for held in names(loaded.model):
        unload(loaded.model, held)
    name, fields = (method, {}) if isinstance(method, str) else (method.NAME, asdict(method))
    started = time.perf_counter()
    session = prepare(
        loaded,
        rows,
        method=name,
        fields=fields,
        config=TrainConfig(**options),
        output=Path(output),
        resume=resume,
    )
    bare = dict(adapters.layers(loaded.model))
    for _ in session:
        pass
    session.finish()
    for path, layer in bare.items():
        adapters.folder._install(loaded.model, {path: layer.base})
    metrics = read(Path(output) / METRICS)
    losses = [row["loss"] for row in metrics if "loss" in row]
    return TrainResult(Path(output), losses[-1], session.run.step, time.perf_counter() - started, metrics)


def export(
    adapter: PathLike,
    output: PathLike,
    *,
    format: str = "peft",
    base: str | None = None,
    verify: bool = False,
    model: PathLike | None = None,
) -> Any:
    """Write an adapter for another library, with a card that says how to load it."""
    from mlx_adapters.convert import exchange, peft

    source, dst = Path(adapter), Path(output)
    if format != "peft":
        return exchange.export(source, dst, format=format, base=base)
    done = peft.export(source, dst, base=base)
    if verify:
        peft.verify(dst, model or adapters.read_meta(source).base.get("path", ""))
    return done


def _loaded(model: LanguageModel | PathLike) -> LanguageModel:
    return model if isinstance(model, LanguageModel) else load(model)
