"""What a scan of the fields saw, put together as the table has it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from field_values import ABSENT, Case

__all__ = ["Seen", "as_text", "entry", "merged"]

_WORST = ("invalid", "right", "refused", "error", "wrong")


@dataclass(frozen=True)
class Seen:
    """What a change did. `moves`: whether transformers' logits; `outcome`: "right" where ours are the same,
    "wrong" where not, "refused" by an UnsupportedError, "error" for others, "invalid" where transformers
    cannot compute it."""

    case: Case
    outcome: str
    moves: bool = True
    note: str = ""

    def __str__(self) -> str:
        what = f"{self.outcome:8}{'' if self.moves else '(does not move transformers) '}"
        return f"{what}{self.case.label} = {self.case.value!r} {self.note}"


def entry(scans: list[list[Seen]]) -> dict[str, Any]:
    """The table's entry of one model_type, from the scans of its base configurations.

    Fields that act alike and those that do nothing are named; of any other field it has the values tried, by
    what they did.
    """
    firsts = [seen[0] for seen in scans]
    found: dict[str, Any] = {}
    if all(first.outcome != "right" for first in firsts):
        found["base"] = f"{firsts[0].outcome}: {firsts[0].note}"
    by_label: dict[str, list[Seen]] = {}
    for seen in scans:
        if seen[0].outcome == "right":
            for one in seen[1:]:
                by_label.setdefault(one.case.label, []).append(one)
    alike: list[str] = []
    idle: list[str] = []
    aliases: dict[str, str] = {}
    fields, defaults = {}, {}
    for label, seen_of_it in sorted(by_label.items()):
        tried = [one for one in seen_of_it if one.outcome != "invalid"]
        given = [one for one in tried if one.case.value != ABSENT]
        for one in tried:
            if one.case.value == ABSENT and one.outcome == "wrong":
                defaults[label] = one.case.fields[label]
        if not given:
            continue
        if all(one.outcome == "right" for one in given):
            (alike if any(one.moves for one in given) else idle).append(label)
        else:
            fields[label] = _values(given)
            aliases |= {label: given[0].case.alias} if given[0].case.alias else {}
    if alike:
        found["alike"] = " ".join(alike)
    if idle:
        found["idle"] = " ".join(idle)
    more = {"defaults": defaults, "aliases": aliases, "fields": fields}
    return found | {name: value for name, value in more.items() if value}


def _values(given: Iterable[Seen]) -> dict[str, list[Any]]:
    """{outcome: values}, each value under the worst of what it did; the base's value is right."""
    worst: dict[str, tuple[str, Any]] = {}
    for one in given:
        key = json.dumps(one.case.value)
        if key not in worst or _WORST.index(one.outcome) > _WORST.index(worst[key][0]):
            worst[key] = (one.outcome, one.case.value)
    for one in given:
        if one.case.now is not ... and json.dumps(one.case.now) not in worst:
            worst[json.dumps(one.case.now)] = ("right", one.case.now)
    found: dict[str, list[Any]] = {}
    for outcome, value in worst.values():
        found.setdefault(outcome, []).append(value)
    return {outcome: found[outcome] for outcome in _WORST if outcome in found}


def merged(old: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """The whole table with new entries."""
    versions = {name: metadata.version(name) for name in ("mlx-lm", "transformers")}
    models = dict(sorted({**old.get("models", {}), **entries}.items()))
    return {"versions": versions, "not compared": _others(models), "models": models}


def _others(models: dict[str, Any]) -> list[str]:
    """The model_types that both libraries have, and the table has not."""
    import pkgutil

    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    here = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)} | set(MODEL_REMAPPING)
    return sorted((here & set(CONFIG_MAPPING.keys())) - models.keys())


def as_text(table: dict[str, Any]) -> str:
    """The table as JSON, each model_type a line."""
    *others, (last, entries) = table.items()
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in others]
    rows = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()]
    return ",\n".join(["{" + lines[0], *lines[1:], f"{json.dumps(last)}: {{\n" + ",\n".join(rows)]) + "\n}}\n"
