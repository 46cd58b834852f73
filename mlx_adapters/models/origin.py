"""What a model folder remembers of where it came from: the section `mlx_adapters` of its config.json.

    source     the hub id it was converted from, by which PyTorch users load it
    revision   the branch, tag or commit of it, if one was asked for
    template   the prompt template it answers by: that of the adapter that was fused into it
    chat       the chat template's variables of that adapter (`mlx_adapters.models.own_template`)
    names      where its tensors come from in the checkpoint (`mlx_adapters.models.names`)

A config's own `_name_or_path` does not count: it says where somebody once loaded the weights from.
"""

import re
from pathlib import Path
from typing import Any

__all__ = ["is_hub_id", "recorded", "remember", "remembered", "with_record"]

_SECTION, _NAMES = "mlx_adapters", ("source", "revision", "template")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME and is not a folder here; the hub is not asked."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """The whole section of a model's config; empty where there is none."""
    section = config.get(_SECTION)
    return section if isinstance(section, dict) else {}


def remembered(config: dict[str, Any]) -> dict[str, str]:
    """The origin that a model's config records, by the names above; absent ones are left out."""
    section = recorded(config)
    return {name: section[name] for name in _NAMES if isinstance(section.get(name), str) and section[name]}


def remember(config: dict[str, Any], **facts: str | None) -> dict[str, Any]:
    """A copy of `config` whose record of its origin holds these facts alone."""
    others = {name: value for name, value in recorded(config).items() if name not in _NAMES}
    return _with_section(config, others | {name: value for name, value in facts.items() if value})


def with_record(config: dict[str, Any], name: str, record: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of `config` whose section holds `record` under `name`; None takes it out."""
    others = {key: value for key, value in recorded(config).items() if key != name}
    return _with_section(config, others | ({} if record is None else {name: record}))


def _with_section(config: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    without = {name: value for name, value in config.items() if name != _SECTION}
    return without | ({_SECTION: section} if section else {})
