"""The README.md that leaves with an adapter or a fused model: what it is, and how to load and prompt it."""

import json
import shlex
from dataclasses import asdict
from typing import Any

from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.data.templates import TEMPLATES, prompt_for
from mlx_adapters.models.origin import is_hub_id
from mlx_adapters.models.own_template import FILE, OWN, ChatTemplate

__all__ = ["GENERATION", "LOCAL", "adapter_card", "fused_card", "in_python", "short_card"]

LOCAL = "PATH/OF/THIS/FOLDER"
_INSTRUCTION = "YOUR INSTRUCTION"


def adapter_card(meta: AdapterMeta, base: str, training: dict[str, Any]) -> str:
    """The card of an adapter in PEFT's format; `training` is what strangers may know of how it was made."""
    in_peft = meta.method.IN_PEFT
    rows = "\n".join(
        f"| {_cell(name)} | {_cell(value)} |" for name, value in {**asdict(meta.method), **training}.items()
    )
    front = (
        "---\n" + ("library_name: peft\n" if in_peft else "") + f"tags: [{meta.method.NAME}, mlx-adapters]\n"
    )
    front += f"base_model: {json.dumps(base)}\n---\n\n" if is_hub_id(base) else "---\n\n"
    files = (
        "the files are PEFT's"
        if in_peft
        else f"PEFT has no {meta.method.NAME}, the folder brings its own loader"
    )
    return f"""{front}# {meta.method.NAME} adapter for {_cell(base)}

Trained with mlx-adapters on Apple MLX; {files}.{_precision(meta)}

| setting | value |
|---|---|
{rows}

## Load it in PyTorch

```python
{(_WITH_PEFT if in_peft else _WITHOUT).format(base=_arguments(base, meta))}
```
{_ALSO if in_peft else ""}
{_prompt(meta.template, meta.chat, _IMPORTED.format(base=_arguments(base, meta)))}
{_answer(meta, _arguments(base, meta))}## Load it in MLX

```
mlx-adapters generate {shlex.quote(base)} --adapter {LOCAL} --prompt "..."
```
"""


def short_card(meta: AdapterMeta, library: str, base: str | None, note: str = "") -> str:
    """The card of an adapter in another library's format; `note` is about prompts there."""
    title = f"# {meta.method.NAME} adapter" + (f" for {_cell(base)}" if base else "")
    made = f"Trained with mlx-adapters; the files are for {library}."
    return f"{title}\n\n{made}\n\n{_prompt(meta.template, meta.chat)}" + (f"\n{note}\n" if note else "")


def fused_card(method: str, base: str | None, template: str, chat: ChatTemplate = OWN) -> str:
    """The card of a model with an adapter in its weights."""
    title = f"# {_cell(base) if base else 'A model'} with a {method} adapter in its weights"
    return f"{title}\n\nFused with mlx-adapters.\n\n{_prompt(template, chat)}"


_WITH_PEFT = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "PATH/OF/THIS/FOLDER")"""
_WITHOUT = """from transformers import AutoModelForCausalLM
from load_adapter import load_adapter  # the file in this folder; it needs torch, safetensors, transformers

base = AutoModelForCausalLM.from_pretrained({base})
model = load_adapter(base, "PATH/OF/THIS/FOLDER")"""
_ALSO = """
Without PEFT: `load_adapter(base, "PATH/OF/THIS/FOLDER")` from the file `load_adapter.py` in this folder.
"""


def in_python(folder: object, base: str, meta: AdapterMeta) -> list[str]:
    """The lines of Python that open an exported adapter in PyTorch."""
    code = (_WITH_PEFT if meta.method.IN_PEFT else _WITHOUT).format(base=_arguments(base, meta))
    return code.replace('"PATH/OF/THIS/FOLDER"', json.dumps(str(folder))).splitlines()


def _arguments(base: str, meta: AdapterMeta) -> str:
    """What stands between the brackets of `from_pretrained`: a name from somewhere else is data, not code."""
    revision = meta.base.get("revision")
    same = revision and base == meta.base.get("_name_or_path")
    return json.dumps(base) + (f", revision={json.dumps(str(revision))}" if same else "")


def _prompt(template: str, chat: ChatTemplate, setup: str = "") -> str:
    """How a prompt looks, as code: every blank and line break of it counts. `setup` makes the tokenizer."""
    if template not in TEMPLATES:
        return f"## The prompt\n\nThe prompt template was `{_cell(template) or 'unknown'}`.\n"
    head = f"## The prompt\n\nThe prompt template was `{template}`. It answers as trained to these prompts:"
    if template != "chat":
        text = prompt_for(_INSTRUCTION, template=template, tokenizer=None, phase="eval")
        return f"{head}\n\n```python\nprompt = {json.dumps(text)}\n```\n"
    said, code = "", setup
    if chat.text:
        said = " of the file `chat_template.jinja` in this folder"
        code += f'with open("{LOCAL}/{FILE}", encoding="utf-8") as file:\n'
        code += "    tokenizer.chat_template = file.read()\n"
    if chat.kwargs:
        said += f" with the variables {', '.join(f'`{_code(name)}`' for name in chat.kwargs)}"
    code += f'messages = [{{"role": "user", "content": {json.dumps(_INSTRUCTION)}}}]\n'
    code += "prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True"
    code += f", **{chat.kwargs!r})" if chat.kwargs else ")"
    if chat.unasked:
        said += ", without what it opens at the end, since the answers have no reasoning"
        code += f"\nprompt = prompt.removesuffix({json.dumps(chat.unasked)})"
    return head.replace("`chat`.", f"`chat`{said}.") + f"\n\n```python\n{code}\n```\n"


def _answer(meta: AdapterMeta, base: str) -> str:
    """How an answer is asked for in PyTorch, up to the tokens that ended answers in training."""
    if not meta.chat.stops:
        return ""
    names = ", ".join(f"`{_code(token)}` ({number})" for token, number in meta.chat.stops.items())
    chat = meta.template == "chat"
    code = "from transformers import GenerationConfig\n\n" if chat else _ASKS.format(base=base)
    # a chat template writes the tokenizer's first token itself
    code += f'inputs = tokenizer(prompt, return_tensors="pt"{", add_special_tokens=False" if chat else ""})\n'
    said = f"`{GENERATION}` in this folder takes the likeliest token each time, up to {names}"
    return f"## An answer\n\n{said}.\n\n```python\n{code}{_GENERATE}\n```\n\n"


GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained({base})\n"
_IMPORTED = f"from transformers import AutoTokenizer\n\n{_TOKENIZER}"
_ASKS = f"from transformers import AutoTokenizer, GenerationConfig\n\n{_TOKENIZER}"
_GENERATE = f"""ends = GenerationConfig.from_pretrained("{LOCAL}", max_new_tokens=256)
tokens = model.generate(**inputs, generation_config=ends)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _cell(value: Any) -> str:
    """A value as one cell of a table, or part of a line."""
    return " ".join(str(value).replace("|", "\\|").replace("`", "'").split())


def _code(text: str) -> str:
    """What stands between backticks in a line."""
    return " ".join(text.replace("`", "'").split())


def _precision(meta: AdapterMeta) -> str:
    if not (quantization := meta.base.get("quantization")):
        return ""
    return (
        f"\nThe base was quantized while training ({quantization.get('bits')} bits): on a full-precision "
        "base the outputs differ by what that rounding changed."
    )
