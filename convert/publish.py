"""An adapter as a repository of the hub: its PEFT export, with a card that says what it is and how good.

The token is the hub client's own (`hf auth login`, HF_TOKEN): it is never read into a message or a file here.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters import adapter
from mlx_adapters.convert import exchange, peft
from mlx_adapters.errors import AdapterError, ConfigError, DataError, OutputError
from mlx_adapters.evaluate.records import read_report
from mlx_adapters.evaluate.score import summarise

__all__ = ["Prepared", "check_name", "prepare", "upload"]

_LOCAL = "PATH/OF/THIS/FOLDER"  # as the export's card says it


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
        raise ConfigError(f"{repo}: is no hub id ({str(error).splitlines()[0]}). Give OWNER/NAME") from None
    if repo.count("/") != 1:
        raise ConfigError(f"{repo}: is no hub id. Give OWNER/NAME")


def prepare(
    source: Path, dst: Path, repo: str, *, base: str | None = None, reports: Sequence[Path] = ()
) -> Prepared:
    """Write what shall be uploaded to the new folder `dst`: the export, its card, nothing of this machine.

    `reports` are what `eval --output` wrote for this very adapter. Raises AdapterError where the base is a
    local path, DataError for a report of another adapter, OutputError for a `dst` that is not empty.
    """
    check_name(repo)
    scores = "".join(_scores(report, source) for report in reports)  # a wrong report before any writing
    meta = adapter.read_meta(source)
    named = base or json.loads((source / adapter.CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    if not named or named.count("/") != 1 or named.startswith(("/", ".", "~")) or Path(named).exists():
        raise AdapterError(
            f"{source}: names its base {named or 'not at all'}, which others cannot load. "
            "Give its hub id with --base OWNER/NAME"
        )
    peft.export(source, dst, base=named)
    _forget_paths(dst / adapter.META)
    card = dst / "README.md"
    fetch = f"hf download {repo} --local-dir {_LOCAL}"
    text = card.read_text("utf-8").rstrip("\n") + f"\n\nFetch it first: `{fetch}`\n"
    text = text.replace(f'from_pretrained(base, "{_LOCAL}")', f'from_pretrained(base, "{repo}")')
    if "adapterhub" in exchange.formats(meta.method):
        text += (
            f"\n## Load it in AdapterHub\n\n```\n{fetch}\n"
            f"mlx-adapters export {_LOCAL} FOR-ADAPTERHUB --format adapterhub\n```\n\n"
            '```python\nimport adapters\n\nadapters.init(base)\nbase.load_adapter("FOR-ADAPTERHUB", '
            "set_active=True)\n```\n"
        )
    text += f"\n## Scores\n\n{scores}" if scores else ""
    hashes = "".join(f"| {name} | {count} | `{digest}` |\n" for name, count, digest in _files(dst, card))
    text += f"\n## Files\n\n| file | bytes | sha256 |\n|---|---|---|\n{hashes}"
    card.write_text(text, encoding="utf-8")
    return Prepared(dst, tuple(_files(dst)))


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

    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    token = get_token()
    return line.replace(token, "[token]") if token else line


def _scores(report: Path, source: Path) -> str:
    settings, records = read_report(report)
    weights = source / adapter.WEIGHTS
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    if settings.get("adapter_sha256") != digest:
        raise DataError(f"{report}: measures another adapter than {source}. Evaluate this one again")
    rows = ""
    for task in dict.fromkeys(record.task for record in records):
        score = summarise([record for record in records if record.task == task])
        rows += (
            f"| {task} | {score.correct}/{score.total} | {score.accuracy:.1%} | "
            f"{score.low:.1%} - {score.high:.1%} | {score.seen_total} |\n"
        )
    limit = f", {settings['limit']} items of each" if settings.get("limit") else ""
    return (
        f"Measured with `mlx-adapters eval`, decoding {settings.get('decoding')}, template "
        f"{settings.get('template')}{limit}.\n\n"
        f"| task | correct | accuracy | 95 % interval | seen in training |\n|---|---|---|---|---|\n{rows}\n"
    )


def _forget_paths(file: Path) -> None:
    """Where the base lay on this machine is nobody's business."""
    if file.exists():
        meta: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if isinstance(meta.get("base"), dict):
            meta["base"].pop("path", None)
            if str(meta["base"].get("_name_or_path", "")).startswith(("/", "~", ".")):
                meta["base"].pop("_name_or_path")
        file.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path, *without: Path) -> list[tuple[str, int, str]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file not in without)
    return [
        (str(file.relative_to(folder)), file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files
    ]
