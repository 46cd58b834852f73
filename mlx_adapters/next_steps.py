"""What a user may do after a command: lines with the user's own paths, ready to be pasted into a shell."""

import shlex
from itertools import islice
from pathlib import Path

from mlx_adapters.adapter.meta import AdapterMeta, read_meta
from mlx_adapters.convert.card import in_python
from mlx_adapters.convert.exchange import Exported
from mlx_adapters.data.overlap import row_text
from mlx_adapters.data.reading import KINDS
from mlx_adapters.data.sources import GENERATED, Rows
from mlx_adapters.errors import AdaptersError
from mlx_adapters.evaluate.tasks import load_file
from mlx_adapters.train.run_file import several

__all__ = [
    *("after_adapter", "after_convert", "after_eval", "after_export", "after_fuse", "after_quickstart"),
    *("after_statistics", "after_train", "line"),
]

# The paper's training sets and the test sets that the paper measures with them.
_TASKS = {"math_10k": "math", "math_7k": "math", "math_14k": "math"}
_TASKS |= {"commonsense_15k": "commonsense", "commonsense_170k": "commonsense", GENERATED: GENERATED}
_LONGEST = 120  # characters of a question on the command line
_LOOKED = 100  # rows
_ASK = "Why is the sky blue?"
_HUB = "OWNER/NAME"  # where nothing says which model of the hub the base is


def line(*words: object) -> str:
    """A command of this program, quoted for a shell."""
    return shlex.join(["mlx-adapters", *map(str, words)])


def after_train(model: str, data: str | list[str], rows: Rows, output: Path, meta: AdapterMeta) -> list[str]:
    """After the training of an adapter: ask it, measure it where there is a test set, hand it over.

    Args:
        model: the base model, as it was given.
        data: the training data, as it was given: a source, or several.
        rows: what was read of it.
        output: the adapter's folder.
        meta: what that folder says.
    """
    sources = [Path(one) for one in several(data)]
    found = []
    for source in sources:
        if (task := _TASKS.get(source.stem)) is not None:
            found.append(line("eval", model, "--adapter", output, "--task", task, *_sets(source)))
        else:
            found += [line("eval", model, "--adapter", output, "--task", file) for file in _tests(source)]
    if not any(source.stem in _TASKS for source in sources):
        found.append(line("generate", model, "--adapter", output, "--prompt", _question(rows)))
        if meta.template == "chat":
            found.append(line("chat", model, "--adapter", output))
    return [*found, _export(output, meta)]


def after_statistics(source: str, model: str) -> list[str]:
    """After a look at training data: see rows of it, train on it."""
    return [
        line("data", "show", source, "--model", model),
        line("train", model, "--data", source, "--output", "my-adapter"),
    ]


def after_adapter(folder: Path, model: str | None, meta: AdapterMeta) -> list[str]:
    """After an adapter was written that was not trained here: ask it. `model` is the base, as given."""
    base = model or meta.base.get("path") or meta.hub_id
    return [line("generate", base or "MODEL", "--adapter", folder, "--prompt", _ASK), line("info", folder)]


def after_fuse(folder: Path) -> list[str]:
    """After a model was fused: ask it."""
    return [line("generate", folder, "--prompt", _ASK)]


def after_convert(folder: Path) -> list[str]:
    """After a conversion: ask the model, train on it."""
    return [
        line("generate", folder, "--prompt", _ASK),
        line("train", folder, "--data", "YOUR.jsonl", "--output", "my-adapter"),
    ]


def after_quickstart(folder: Path) -> list[str]:
    """After the quickstart: ask what it has trained, and train on data of one's own."""
    model, adapter = folder / "model", folder / "adapter"
    question = "Tom has 3 apples. Ann gives Tom 4 more. How many?"
    return [
        line("generate", model, "--adapter", adapter, "--prompt", question),
        line("info", adapter),
        line("data", "show", "YOUR.jsonl", "--model", model),
        line("train", model, "--data", "YOUR.jsonl", "--output", "my-adapter"),
    ]


def after_export(done: Exported, meta: AdapterMeta) -> list[str]:
    """After an export: the lines of Python that open it, to be pasted there as they stand."""
    if done.format != "peft" or not done.base:
        return [f"{done.path / 'README.md'} says more"]
    return ["In Python:", "", *in_python(done.path, done.base, meta)]


def after_eval(model: str, task: str, *, adapter: Path | None, output: Path | None) -> list[str]:
    """After a measurement: of the base, train; of an adapter, measure the base too and compare, or hand the
    adapter over."""
    if adapter is None:
        return [line("train", model, "--data", "YOUR.jsonl", "--output", "my-adapter")]
    meta = read_meta(adapter)
    if output is None:
        return [_export(adapter, meta)]
    base = output.with_name(f"{output.stem}-base.json")
    template = ["--template", meta.template] if meta.template else []
    return [
        line("eval", model, "--task", task, *template, "--output", base),
        line("compare", base, output),
        _export(adapter, meta),
    ]


def _export(adapter: Path, meta: AdapterMeta) -> str:
    base = [] if meta.hub_id else ["--base", _HUB]
    return line("export", adapter, f"{adapter}-for-pytorch", *base)


def _sets(data: Path) -> list[str]:
    """Where the test sets lie, if not on the hub: in the copy of LLM-Adapters that the training set is in."""
    places = [data.parent, data.parent / "dataset", data.parent.parent / "dataset"]
    found = next((place for place in places if (place / "SVAMP" / "test.json").is_file()), None)
    return ["--data-dir", str(found)] if found else []


def _tests(data: Path) -> list[Path]:
    """The test file beside the training file, or in its folder, if `eval` can read it."""
    folder = data if data.is_dir() else data.parent
    if not (data.is_dir() or data.name.partition(".")[0] == "train"):
        return []
    for file in (folder / f"test{kind}" for kind in KINDS):
        try:
            if file.is_file():
                load_file(file)
                return [file]
        except AdaptersError:  # a test set of another kind: texts, say, that no answer is read of
            continue
    return []


def _question(rows: Rows) -> str:
    """The first question of the rows that fits on a line."""
    texts = [" ".join(row_text(row, rows.format).split()) for row in islice(rows.rows, _LOOKED)]
    fitting = (text for text in texts if 0 < len(text) <= _LONGEST)
    return next(fitting, texts[0][:_LONGEST].strip() or "Hello")
