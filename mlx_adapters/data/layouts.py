"""The fields that training rows come with, and the four forms that they become.

| form | fields of a row |
|---|---|
| instruction | instruction, output (and input); instruction, response (and context) |
| | question, answer; input, output |
| completion | prompt, completion; prompt, response; as two lists of messages they become messages |
| messages | messages (and system, tools, chat_template_kwargs); conversations of from and value |
| text | text |

Each row is told by its own fields: one file may hold questions with and without a context, but not two forms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters.errors import ConfigError, DataError, unknown

__all__ = ["FORMS", "Layout", "as_form", "column_names", "known_fields", "layout_of", "renamed"]

FORMS = ("instruction", "completion", "messages", "text")
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """`needed` and `more`: {the form's field: the row's}; `more` may be absent."""

    form: str
    needed: Mapping[str, str]
    more: Mapping[str, str] = field(default_factory=dict)


_CHAT = {"system": "system", "tools": "tools", "chat_template_kwargs": "chat_template_kwargs"}
_LAYOUTS = (
    Layout("messages", {"messages": "messages"}, _CHAT),
    Layout("messages", {"messages": "conversations"}, _CHAT),
    Layout("instruction", {"instruction": "instruction", "output": "output"}, {"input": "input"}),
    Layout("instruction", {"instruction": "instruction", "output": "response"}, {"input": "context"}),
    Layout("completion", {"prompt": "prompt", "completion": "completion"}),
    Layout("completion", {"prompt": "prompt", "completion": "response"}),
    Layout("instruction", {"instruction": "question", "output": "answer"}),
    Layout("instruction", {"instruction": "input", "output": "output"}),
    Layout("text", {"text": "text"}),
)
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def layout_of(row: Any) -> Layout:
    """The layout of a row. DataError, with the known ones, where its fields are of none."""
    if not isinstance(row, dict):
        raise DataError(f"is {type(row).__name__}, not an object")
    for layout in _LAYOUTS:
        if all(name in row for name in layout.needed.values()):
            return layout
    if {"chosen", "rejected"} <= row.keys():
        known = "messages" if isinstance(row["chosen"], list) else "completion"
        raise DataError(
            "fields 'chosen' and 'rejected' are a preference, which is not learned here: --columns "
            f"{known}=chosen trains on the chosen answers alone"
        )
    found = ", ".join(map(str, row)) or "none"
    for layout in _LAYOUTS:
        needed = {*layout.needed.values()}
        if needed & {*row} and (missing := sorted(needed - {*row})):
            hint = f". --columns {missing[0]}=NAME takes another" if {*row} - known_fields(layout) else ""
            raise DataError(f"field {missing[0]!r} is missing; found {found}{hint}")
    forms = "; ".join("+".join(layout.needed.values()) for layout in _LAYOUTS)
    raise DataError(
        f"unknown fields ({found}). Known: {forms}. Others are named by --columns prompt=NAME,completion=NAME"
    )


def known_fields(layout: Layout) -> set[str]:
    """The fields of a row of this layout that are read."""
    return {*layout.needed.values(), *layout.more.values()}


def column_names(text: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as {the known name: the rows'}; ConfigError for another form."""
    names = {}
    known = sorted({name for layout in _LAYOUTS for name in (*layout.needed.values(), *layout.more.values())})
    for part in (text or "").split(","):
        name, given, column = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not given or not column:
            raise ConfigError(f"columns: {part.strip()!r} is not of the form NAME=COLUMN, as prompt=question")
        if name not in known:
            raise ConfigError(unknown("field for columns", name, known))
        names[name] = column
    return names


def renamed(row: Any, columns: Mapping[str, str] | None) -> Any:
    """`row` with the fields that `columns` says ({the known name: the row's}), without others of that name.

    DataError for a column that the row does not have.
    """
    if not columns or not isinstance(row, dict):
        return row
    for known, column in columns.items():
        if column not in row:
            raise DataError(f"column {column!r} (for {known}) is missing; there are {', '.join(row)}")
    taken = {*columns, *columns.values()}
    taken |= {"rejected"} if "chosen" in taken else set()  # whoever asks for one of the two has chosen
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**{known: row[column] for known, column in columns.items()}, **kept}


def as_form(row: Row, layout: Layout) -> tuple[Row, str]:
    """(the row in its form's own fields, the form). What no form reads stays in it."""
    both = {**layout.needed, **{name: column for name, column in layout.more.items() if column in row}}
    made = {name: row[column] for name, column in both.items()}
    made |= {
        name: value for name, value in row.items() if name not in known_fields(layout) and name not in made
    }
    if layout.needed.get("messages") == "conversations":
        return made | {"messages": _from_sharegpt(row["conversations"])}, "messages"
    if layout.form == "completion" and isinstance(made["prompt"], list):
        return _from_lists(made), "messages"
    return made, layout.form


def _from_sharegpt(turns: Any) -> Any:
    """ShareGPT's turns as messages; the caller checks what is no list of turns."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    messages = []
    for turn in turns:
        speaker = str(turn["from"])
        if speaker not in _SPEAKERS:
            raise DataError(f"field 'from' is {speaker!r}, which is not one of {', '.join(_SPEAKERS)}")
        messages.append({"role": _SPEAKERS[speaker], "content": turn.get("value")})
    return messages


def _from_lists(row: Row) -> Row:
    """A prompt and a completion that are lists of messages: only the completion's answers are learned."""
    if not isinstance(row["completion"], list):
        raise DataError("field 'prompt' is a list of messages, so 'completion' must be one too")
    context = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in row["prompt"]]
    rest = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    return {"messages": [*context, *row["completion"]], **rest}
