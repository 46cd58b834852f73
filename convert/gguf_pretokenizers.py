"""How a text is cut before byte-pair merging, by the name that llama.cpp's files have for it.

A GGUF file names the rule (`tokenizer.ggml.pre`) and does not hold it.
"""

from dataclasses import dataclass, replace

__all__ = ["PRE_TOKENIZERS", "Cut"]


@dataclass(frozen=True)
class Cut:
    """The regular expressions that cut a text, in order.

    `whole_words`: a piece that is in the vocabulary is taken without merging. `begins`: a text begins with
    the token for it where the file does not say. `nfc`: the text is composed first.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    nfc: bool = False


_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# words that begin with small letters, then words that begin with capitals
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LARGE = r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _SMALL + _LARGE + r"|\p{N}" + _PATHS
_GPT4O = _SMALL + _ENDINGS + "?" + _LARGE + _ENDINGS + "?" + r"|\p{N}{1,3}" + _PATHS
_SEED = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"

_PLAIN, _DIGITS = Cut((_WORDS,)), Cut((r"\p{N}", _WORDS))
_META = Cut((_LLAMA3,), whole_words=True, begins=True)
_QWEN, _OPENAI = Cut((_QWEN2,)), Cut((_GPT4O,))

PRE_TOKENIZERS: dict[str, Cut] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mellum", "exaone4", "granite-docling"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone", "mellum2"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "smaug-bpe"), _META),
    **dict.fromkeys(("falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _META),
    "dbrx": Cut((_LLAMA3,)),
    "chatglm-bpe": Cut((_LLAMA3,)),
    **dict.fromkeys(("glm4", "glm5"), Cut((_LLAMA3,), whole_words=True)),
    "qwen2": replace(_QWEN, nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _QWEN),
    "qwen35": Cut((_QWEN35,), nfc=True),
    "tekken": Cut((_TEKKEN,), whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _OPENAI),
    "seed-coder": Cut((_SEED,)),
}
