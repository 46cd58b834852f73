"""Was this test item in the training data? Compared by a hash of the question's letters and digits."""

import hashlib
from typing import Any

__all__ = ["item_hash", "row_text"]


def item_hash(text: str) -> str:
    """16 hexadecimal digits of the letters and digits of `text`, case folded; the rest does not count."""
    plain = "".join(character for character in text.casefold() if character.isalnum())
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def row_text(row: dict[str, Any], fmt: str) -> str:
    """The part of a row that makes it the same item: the question, not the answer."""
    if fmt == "instruction":
        return f"{row['instruction']}{row.get('input') or ''}"
    if fmt == "completion":
        return str(row["prompt"])
    if fmt == "messages":
        return "".join(str(turn.get("content", "")) for turn in row["messages"] if turn["role"] == "user")
    return str(row["text"])
