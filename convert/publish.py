"""An adapter as a repository of the hub: its PEFT export, with a card that says what it is and how good.

The token is the hub client's own (`hf auth login`, HF_TOKEN): it is never read into a message or a file here.
"""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_adapters import adapter
from mlx_adapters.convert import exchange, peft
from mlx_adapters.convert.card import LOCAL
from mlx_adapters.errors import ConfigError, DataError, OutputError, first_line
from mlx_adapters.evaluate.hub import HUB
from mlx_adapters.evaluate.records import read_report
from mlx_adapters.evaluate.score import Score, summarise
from mlx_adapters.files.writing import writing
from mlx_adapters.models.origin import is_hub_id

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["Prepared", "check_name", "prepare", "push", "upload"]

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Prepared:
    """A folder ready to go, with (name, bytes, sha256) of its files."""

    path: Path
    files: tuple[tuple[str, int, str], ...]


def check_name(repo: str) -> None:
    """ConfigError unless `repo` is a hub id, OWNER/NAME."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ConfigError(f"{repo}: is no hub id ({first_line(error)}). Give OWNER/NAME") from None
    if repo.count("/") != 1:
        raise ConfigError(f"{repo}: is no hub id. Give OWNER/NAME")


def push(
    source: Path, repo: str, *, output: Path | None = None, private: bool = False, **options: Any
) -> tuple[Prepared, str | None]:
    """Prepare the adapter and upload it, or with `output` write it to that folder alone.

    `options` are those of `prepare`. Returns what was prepared, and the repository's address if it was sent.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-push-") as temporary:
        prepared = prepare(source, output or Path(temporary) / "adapter", repo, **options)
        return prepared, None if output else upload(prepared, repo, private=private)


def prepare(
    source: Path,
    dst: Path,
    repo: str,
    *,
    base: str | None = None,
    license: str | None = None,
    reports: Sequence[Path] = (),
) -> Prepared:
    """Write what shall be uploaded to the new folder `dst`: the export, its card, nothing of this machine.

    `reports` are what `eval --output` wrote for this very adapter; `license` is the hub's name of one, and
    without it the card names none. Raises AdapterError where the base is a local path, DataError for a report
    of another adapter, OutputError for a `dst` that is not empty.
    """
    check_name(repo)
    source = adapter.located(source)
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(
            f"--license {license!r}: give the hub's name of it, like apache-2.0, mit or cc-by-4.0"
        )
    measured = [_Measured.read(report, source) for report in reports]  # a wrong one before any writing
    meta = adapter.read_meta(source)
    if base is not None and not is_hub_id(base):
        raise ConfigError(f"--base {base!r}: is a name which others cannot load. Give a hub id, OWNER/NAME")
    with writing(dst) as place:
        peft.export(source, place, base=base)
        _write_card(place / "README.md", repo, meta, measured, license)
    return Prepared(dst, tuple(_files(dst)))


def _write_card(
    file: Path, repo: str, meta: adapter.AdapterMeta, measured: "Sequence[_Measured]", license: str | None
) -> None:
    """Complete the export's card: what the hub reads in its head, how to fetch it, scores, hashes."""
    from huggingface_hub import ModelCard

    fetch = f"hf download {repo} --local-dir {LOCAL}"
    text = file.read_text("utf-8").rstrip("\n") + f"\n\nFetch it first: `{fetch}`\n"
    text = text.replace(f'from_pretrained(base, "{LOCAL}")', f'from_pretrained(base, "{repo}")')
    if "adapterhub" in exchange.formats(meta.method.NAME):
        text += (
            f"\n## Load it in AdapterHub\n\n```\n{fetch}\n"
            f"mlx-adapters export {LOCAL} FOR-ADAPTERHUB --format adapterhub\n```\n\n"
            '```python\nimport adapters\n\nadapters.init(base)\nbase.load_adapter("FOR-ADAPTERHUB", '
            "set_active=True)\n```\n"
        )
    if measured:
        text += "\n## Scores\n\n" + "".join(one.table() for one in measured)
    hashes = "".join(
        f"| {name} | {count} | `{digest}` |\n" for name, count, digest in _files(file.parent, file)
    )
    text += f"\n## Files\n\n| file | bytes | sha256 |\n|---|---|---|\n{hashes}"
    card = ModelCard(text)
    card.data.base_model_relation = "adapter"
    card.data.pipeline_tag = "text-generation"
    card.data.license = license
    if found := peft.HUB_DATA.fullmatch(str(meta.training.get("data"))):
        card.data.datasets = [found[1]]
    if measured:
        card.data.model_name = repo.partition("/")[2]
        card.data.eval_results = [result for one in measured for result in one.results()]
        card.data.metrics = ["accuracy"]
    file.write_text(str(card), encoding="utf-8")


def upload(prepared: Prepared, repo: str, *, private: bool) -> str:
    """Make the repository if it is not there and upload the folder as one commit; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="mlx-adapters")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=prepared.path, commit_message="Adapter trained with mlx-adapters"
        )
    except Exception as error:  # the hub client raises many unrelated types for "could not upload"
        raise OutputError(f"{repo}: the hub did not take it ({_reason(error)})") from None
    return str(url)


def _reason(error: Exception) -> str:
    """The first line of an error, without the token should it stand there."""
    from huggingface_hub import get_token

    line = first_line(error)
    token = get_token()
    return line.replace(token, "[token]") if token else line


@dataclass(frozen=True)
class _Measured:
    """What a report of `eval` measured, for the card."""

    settings: dict[str, Any]
    scores: tuple[Score, ...]

    @classmethod
    def read(cls, report: Path, source: Path) -> "_Measured":
        settings, records = read_report(report)
        weights = adapter.weights_file(source)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
        if settings.get("adapter_sha256") != digest:
            raise DataError(f"{report}: measures another adapter than {source}. Evaluate this one again")
        tasks = dict.fromkeys(record.task for record in records)
        return cls(
            settings,
            tuple(summarise([record for record in records if record.task == task]) for task in tasks),
        )

    def table(self) -> str:
        """People read this: every score with its interval."""
        rows = "".join(
            f"| {score.task} | {score.correct}/{score.total} | {score.accuracy:.1%} | "
            f"{score.low:.1%} - {score.high:.1%} | {score.seen_total} |\n"
            for score in self.scores
        )
        head = "| task | correct | accuracy | 95 % interval | seen in training |\n|---|---|---|---|---|\n"
        return f"Measured with `mlx-adapters eval`, {self._how()}.\n\n{head}{rows}\n"

    def results(self) -> "list[EvalResult]":
        """The hub reads this: its model-index."""
        from huggingface_hub import EvalResult

        from_hub = self.settings.get("data") == "hub"
        found = []
        for score in self.scores:
            place = HUB.get(score.task) if from_hub else None
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=place.id if place else score.task,
                    dataset_name=score.task,
                    dataset_config=place.config if place else None,
                    dataset_split=place.split if place else None,
                    metric_type="accuracy",
                    metric_value=round(score.accuracy, 4),
                    metric_name=(
                        f"accuracy, {score.correct} of {score.total}, 95 % interval {score.low:.4f} to "
                        f"{score.high:.4f}; {self._how()}"
                    ),
                )
            )
        return found

    def _how(self) -> str:
        limit = f", {self.settings['limit']} items of each" if self.settings.get("limit") else ""
        limit += ", answers read by the paper's rule" if self.settings.get("reading") == "paper" else ""
        return f"decoding {self.settings.get('decoding')}, template {self.settings.get('template')}{limit}"


def _files(folder: Path, *without: Path) -> list[tuple[str, int, str]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file not in without)
    return [
        (str(file.relative_to(folder)), file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files
    ]
