"""Export an adapter to a PEFT folder, and prove that PyTorch computes the same with it.

Our adapter folders are PEFT's already (`mlx_adapters.adapter`), so an export is a check, the hub id of the
base, and a model card.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters import adapter, methods
from mlx_adapters import model as models
from mlx_adapters.convert.against_torch import (
    bound,
    logits,
    max_diff,
    quiet_transformers,
    require,
    require_class,
)
from mlx_adapters.convert.files import folder_bytes, writing
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import AdapterError
from mlx_adapters.methods.experts import EXPERT_NAMES
from mlx_adapters.models.sites import EXPERTS
from mlx_adapters.virtual import start_cache, with_virtual

__all__ = ["HUB_DATA", "Exported", "Verdict", "export", "public", "verify"]

_PROMPTS = (
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "The capital of France is",
    "Below is an instruction that describes a task.",
)
_NEW_TOKENS = 20
HUB_DATA = re.compile(r"([\w.-]+/[\w.-]+) \(\w+\)")
"""How an adapter remembers training data of the hub: `OWNER/NAME (split)`."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    tensors: int
    bytes: int
    base: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the adapter in PyTorch compares with the adapter in MLX, in float32 on the same base.

    `peft_diff` is max|logit difference| through `PeftModel.from_pretrained`, `auto_diff` through
    `AutoModelForCausalLM.from_pretrained(adapter folder)`, None where transformers does not offer that for
    the method; `bound` is 1e-5 + 1e-5 * max|logit|.
    `effect` is the negative control: how far the logits move when the adapter is left out.
    """

    peft_diff: float
    auto_diff: float | None
    bound: float
    effect: float
    greedy_equal: bool
    tokens: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison held. The effect is a control of the test, not a property to demand."""
        close = max(self.peft_diff, self.auto_diff or 0.0) <= self.bound
        return close and self.greedy_equal and not self.missing and not self.unexpected


def export(source: Path, dst: Path, *, base: str | None = None) -> Exported:
    """Write the adapter in `source` to `dst` as a PEFT folder with a model card.

    `base` is the hub id (or path) that PyTorch users will load the base from. Raises AdapterError for a
    folder that is no adapter, OutputError for a `dst` that is not empty.
    """
    meta = adapter.read_meta(source)
    fields = adapter.read_fields(source)
    if base is not None:
        fields["base_model_name_or_path"] = base
    if not fields.get("base_model_name_or_path"):
        raise AdapterError(
            f"{source}: does not name its base model. Say which one PyTorch shall load: --base OWNER/NAME"
        )
    names = list(adapter.read_tensors(source))
    if any(name.endswith(".experts") for name in names):
        raise AdapterError(
            f"{source}: adapts stacked experts matrix by matrix, which PEFT does not. Write a checkpoint "
            "with mlx-adapters fuse, or an adapter for MLX with --format mlx-lm"
        )
    _refuse_unreadable(source, meta, fields)
    with writing(dst) as folder:
        (folder / adapter.CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for name in (adapter.WEIGHTS, adapter.META, adapter.SEEN):
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        if (source / "members").is_dir():  # a fusion keeps the adapters it is made of
            shutil.copytree(source / "members", folder / "members")
        shutil.copyfile(Path(__file__).with_name("load_adapter.py"), folder / "load_adapter.py")
        (folder / "README.md").write_text(_card(meta, fields), encoding="utf-8")
    size = folder_bytes(dst)
    return Exported(dst, len(names), size, fields["base_model_name_or_path"])


def _refuse_unreadable(source: Path, meta: adapter.AdapterMeta, fields: dict[str, Any]) -> None:
    """AdapterError for layers of a mixture of experts that PEFT opens for plain LoRA alone.

    The router is no linear layer to transformers 5, and LoRA's names in `EXPERT_NAMES` are taken for the
    experts (but for qwen2_moe), where PEFT has no DoRA.
    """
    model_type = meta.base.get("model_type")
    if model_type not in EXPERTS or meta.method == "lora" or not methods.in_peft(meta.method):
        return
    closed = EXPERT_NAMES if meta.method == "dora" and model_type != "qwen2_moe" else ("gate",)
    named = {name.rpartition(".")[2] for name in fields.get("target_modules") or []}
    if found := sorted(named & {*closed}):
        raise AdapterError(
            f"{source}: PEFT opens no {meta.method} on {', '.join(found)} of a mixture of experts. Write a "
            "checkpoint with mlx-adapters fuse, or train with targets attn"
        )


def verify(folder: Path, model: Path | str) -> Verdict:
    """Open the PEFT folder with peft and transformers on the dequantized base, and compare with MLX.

    `model` is the MLX model folder the adapter was trained on. Needs torch, transformers and peft
    (UnsupportedError otherwise). The base is written in float32 to a temporary folder for PyTorch.
    """
    require("peft")
    require_class(models.read_config(models.locate(model))["model_type"])
    loaded = models.load(model, dtype="float32")
    loaded.model.eval()
    prompts = [loaded.tokenizer.encode(text) for text in _PROMPTS]
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-verify-") as temporary:
        base = write_transformers(loaded.model, loaded.config, Path(temporary) / "base")
        copy = _with_base(folder, Path(temporary) / "adapter", base)
        plain = logits(loaded.model, prompts)
        meta = adapter.load(loaded, folder)
        auto = getattr(methods.get(meta.method), "AUTO_MODEL", True)
        loaded.model.eval()
        ours = logits(loaded.model, prompts)
        greedy = [_greedy(loaded.model, ids) for ids in prompts]
        with quiet_transformers():
            return _compare(copy, base, prompts, plain, ours, greedy, auto_offered=auto)


def _compare(
    folder: Path,
    base: Path,
    prompts: list[list[int]],
    plain: list[np.ndarray],
    ours: list[np.ndarray],
    greedy: list[list[int]],
    *,
    auto_offered: bool,
) -> Verdict:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    def opened(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        ).eval()

    peft_model = PeftModel.from_pretrained(opened(base), folder).eval()
    missing, unexpected = _strict(peft_model, load_file(folder / adapter.WEIGHTS), opened(base))
    with torch.no_grad():
        theirs = [peft_model(torch.tensor([ids])).logits[0, -len(ids) :].numpy() for ids in prompts]
        tokens = [_torch_greedy(peft_model, ids) for ids in prompts]
        auto_model = opened(folder) if auto_offered else None
        auto = [auto_model(torch.tensor([ids])).logits[0].numpy() for ids in prompts] if auto_model else None
    return Verdict(
        peft_diff=max_diff(ours, theirs),
        auto_diff=None if auto is None else max_diff(ours, auto),
        bound=bound(theirs),
        effect=max_diff(ours, plain),
        greedy_equal=tokens == greedy,
        tokens=sum(map(len, greedy)),
        missing=missing,
        unexpected=unexpected,
    )


def _strict(peft_model: Any, tensors: dict[str, Any], base: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names the adapter has and the file lacks, the reverse): PEFT itself only warns, or says nothing."""
    from peft import set_peft_model_state_dict

    keys = set_peft_model_state_dict(peft_model, dict(tensors))
    if peft_model.active_peft_config.is_prompt_learning:
        table = peft_model.prompt_encoder["default"].embedding.weight
        same = "prompt_embeddings" in tensors and bool((table == tensors["prompt_embeddings"]).all())
        return (() if same else ("prompt_embeddings",)), tuple(sorted(set(tensors) - {"prompt_embeddings"}))
    # PEFT calls the base's weights missing too, which no adapter holds; its own parameters are the rest
    base_names = {f"base_model.model.{name}" for name in base.state_dict()}
    added = {
        name
        for name, _ in peft_model.named_parameters()
        if name.replace(".base_layer", "").replace(".original_module", "") not in base_names
    }
    return tuple(sorted(added & set(keys.missing_keys or ()))), tuple(keys.unexpected_keys)


def _greedy(model: Any, ids: list[int]) -> list[int]:
    from mlx_lm.models.cache import make_prompt_cache

    cache = start_cache(model) or make_prompt_cache(model)
    chunk, chosen = with_virtual(model, ids), list[int]()
    for _ in range(_NEW_TOKENS):
        chosen.append(_int(mx.argmax(model(mx.array([chunk]), cache=cache)[0, -1])))
        chunk = chosen[-1:]
    return chosen


def _int(value: mx.array) -> int:
    number: int = value.item()  # type: ignore[assignment]
    return number


def _torch_greedy(model: Any, ids: list[int]) -> list[int]:
    # Token by token over the whole text: transformers' generate would stop at the end token, ours goes on.
    import torch

    text = list(ids)
    for _ in range(_NEW_TOKENS):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]


def _with_base(folder: Path, copy: Path, base: Path) -> Path:
    copy.mkdir()
    fields = adapter.read_fields(folder)
    fields["base_model_name_or_path"] = str(base)
    (copy / adapter.CONFIG).write_text(json.dumps(fields), encoding="utf-8")
    shutil.copyfile(folder / adapter.WEIGHTS, copy / adapter.WEIGHTS)
    return copy


def _card(meta: adapter.AdapterMeta, fields: dict[str, Any]) -> str:
    base, in_peft = fields["base_model_name_or_path"], methods.in_peft(meta.method)
    training = {**meta.training}
    if data := training.get("data"):
        training["data"] = public(data)
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in {**meta.config, **training}.items())
    library = "library_name: peft\n" if in_peft else ""
    front = f"---\n{library}tags: [{meta.method}, mlx-adapters]\n"
    front += (
        f"base_model: {base}\n---\n\n"
        if base.count("/") == 1 and not base.startswith(("/", "."))
        else "---\n\n"
    )
    files = (
        "the files are PEFT's" if in_peft else f"PEFT has no {meta.method}, the folder brings its own loader"
    )
    return f"""{front}# {meta.method} adapter for {base}

Trained with mlx-adapters on Apple MLX; {files}.
The prompt template was `{meta.template or "unknown"}`.{_precision(meta)}

| setting | value |
|---|---|
{rows}

## Load it in PyTorch

```python
{(_WITH_PEFT if in_peft else _WITHOUT).format(base=base)}
```
{_ALSO if in_peft else ""}
## Load it in MLX

```
mlx-adapters generate {base} --adapter PATH/OF/THIS/FOLDER --prompt "..."
```
"""


_WITH_PEFT = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH/OF/THIS/FOLDER")"""
_WITHOUT = """from transformers import AutoModelForCausalLM
from load_adapter import load_adapter  # the file in this folder; it needs torch, safetensors, transformers

base = AutoModelForCausalLM.from_pretrained("{base}")
model = load_adapter(base, "PATH/OF/THIS/FOLDER")"""
_ALSO = """
Without PEFT: `load_adapter(base, "PATH/OF/THIS/FOLDER")` from the file `load_adapter.py` in this folder.
"""


def public(data: str) -> str:
    """Where training data came from, for strangers: of a file its name, and not this machine's folders."""
    return data if HUB_DATA.fullmatch(data) else data.replace("\\", "/").rpartition("/")[2]


def _cell(value: Any) -> str:
    """A value as one cell of a table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _precision(meta: adapter.AdapterMeta) -> str:
    if not (quantization := meta.base.get("quantization")):
        return ""
    return (
        f"\nThe base was quantized while training ({quantization.get('bits')} bits): on a full-precision "
        "base the outputs differ by what that rounding changed."
    )
