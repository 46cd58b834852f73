"""Tokenizers with chat templates of the kinds that are published: who writes the first token, what closes a
turn, what is asked to think. The templates are short, in the manner of the models they are named after."""

from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ROLES", "TEMPLATES", "make_speaker"]


class Spoken(NamedTuple):
    """`front` is what the tokenizer itself puts before a text, `eos` its end token (by default the first of
    `special`), `end` the token that the template writes after an answer."""

    template: str
    special: tuple[str, ...]
    front: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = ""
    end: str | None = None
    sentencepiece: bool = False
    system: bool = True


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = (*_IM, "<think>", "</think>")
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES: dict[str, Spoken] = {
    "SmolLM2": Spoken(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nbe kind<|im_end|>\\n' }}{% endif %}"
        + _CHATML,
        _IM,
        bos="<|im_start|>",
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "Qwen2.5": Spoken(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nbe kind<|im_end|>\\n' }}{% endif %}"
        "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}"
        "{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}" + _CHATML,
        _IM,
        end="<|im_end|>",
    ),
    "thinks unless told": Spoken(  # Qwen3
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.reasoning_content %}"
        "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
        "{% endif %}{% endif %}",
        _THINK,
        end="<|im_end|>",
    ),
    "thinks when told": Spoken(  # DeepSeek-V3.1, Granite 3.3
        _CHATML + "{% if add_generation_prompt %}{% if enable_thinking is defined and enable_thinking %}"
        "{{ '<think>\\n' }}{% else %}{{ '</think>' }}{% endif %}{% endif %}",
        _THINK,
        end="<|im_end|>",
    ),
    "Llama 3": Spoken(
        "{% for m in messages %}{% set part = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + "
        "m.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set part = bos_token + part %}{% endif %}"
        "{{ part }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        front=("<|begin_of_text|>",),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        end="<|eot_id|>",
    ),
    "Mistral": Spoken(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content + eos_token }}{% else %}"
        "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        front=("<s>",),
        bos="<s>",
        eos="</s>",
        end="</s>",
        sentencepiece=True,
        system=False,
    ),
    "Gemma": Spoken(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + "
        "'\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        front=("<bos>",),
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        sentencepiece=True,
        system=False,
    ),
    "Phi-3": Spoken(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        front=("<s>",),
        bos="<s>",
        eos="<|endoftext|>",
        end="<|end|>",
        sentencepiece=True,
    ),
    "GLM-4": Spoken(  # no token closes an answer: the next turn's does
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        front=("[gMASK]", "<sop>"),
        eos="<|endoftext|>",
        end="<|user|>",
    ),
    "TinyLlama": Spoken(
        _ZEPHYR, ("<s>", "</s>"), front=("<s>",), bos="<s>", eos="</s>", end="</s>", sentencepiece=True
    ),
    "newline first": Spoken(
        "{{ '\\n' + bos_token }}" + _CHATML,
        ("<s>", *_IM),
        front=("<s>",),
        bos="<s>",
        eos="<|endoftext|>",
        end="<|im_end|>",
    ),
    "DeepSeek": Spoken(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}"
        "{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        ("<|begin of sentence|>", "<|end of sentence|>"),
        front=("<|begin of sentence|>",),
        bos="<|begin of sentence|>",
        eos="<|end of sentence|>",
        end="<|end of sentence|>",
    ),
    "writes <s> itself": Spoken(
        "<s>{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        ("<s>", "</s>"),
        front=("<s>",),
        bos="<s>",
        eos="</s>",
    ),
    "channels": Spoken(  # gpt-oss: <|end|> closes the thinking, and in what was said before also the answer
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
        "{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}{% if m.role == 'assistant' and "
        "loop.last and not add_generation_prompt %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        eos="<|endoftext|>",
        end="<|return|>",
    ),
}
ROLES = {
    name: ("user", "assistant", *(("system",) if spoken.system else ())) for name, spoken in TEMPLATES.items()
}


def make_speaker(name: str, folder: Path, **settings: Any) -> Path:
    """Write the tokenizer `name` to `folder` and return that: fewer than 400 tokens, bytes among them."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    spoken = TEMPLATES[name]
    special = ["<pad>", *spoken.special]
    raw = _sentencepiece(special) if spoken.sentencepiece else _bytes(special)
    if spoken.front:
        places = [(token, raw.token_to_id(token)) for token in spoken.front]
        raw.post_processor = processors.TemplateProcessing(
            single=[*spoken.front, "$A"], pair=[*spoken.front, "$A", "$B"], special_tokens=places
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token=spoken.eos or spoken.special[0],
        additional_special_tokens=[token for token in spoken.special if token != spoken.bos],
        **({"bos_token": spoken.bos} if spoken.bos else {}),
        **settings,
    )
    made.chat_template = spoken.template
    made.save_pretrained(folder)
    return folder


def _bytes(special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("Ġ", "t"), ("o", "m"), ("Ġt", "om"), ("Ġ", "3")]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    raw = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def _sentencepiece(special: list[str]) -> Any:
    from mlx_adapters.convert.tokenizer import sentencepiece_bpe

    ordinary = ["▁tom", "▁t", "om", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,?|<>[]/:"]
    pieces = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *ordinary]
    return sentencepiece_bpe(
        [(piece, -float(index)) for index, piece in enumerate(pieces)],
        mergeable=[piece in ordinary for piece in pieces],
        unknown="<unk>",
    )
