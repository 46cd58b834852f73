"""A tokenizer that speaks a chat template as it was published."""

import re
from pathlib import Path

__all__ = ["speaker"]

_SPECIAL = re.compile(
    r"<\|[\w▁ ]+\|>|<｜[\w▁]+｜>|<\|\w+>|<\w+\|>|\[gMASK\]<sop>|"
    r"</?(?:think|start_of_turn|end_of_turn|s|bos|eos)>"
)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")  # some templates make them of the role


def speaker(template: str, folder: Path) -> Path:
    """Write a tokenizer of bytes, and of the special tokens that the template names; return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(["<pad>", "<s>", "</s>", *_SPECIAL.findall(template), *_ROLES]))
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
    )
    made.chat_template = template
    made.save_pretrained(folder)
    return folder
