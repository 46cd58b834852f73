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

from mlx_adapters import adapter
from mlx_adapters.adapter.call import start_cache, with_virtual
from mlx_adapters.adapter.from_mlx_lm import refuse_mlx_lm
from mlx_adapters.convert.against_torch import (
    auto_class,
    bound,
    logits,
    max_diff,
    quiet_transformers,
    require,
    require_class,
)
from mlx_adapters.convert.card import GENERATION, adapter_card
from mlx_adapters.convert.in_peft import closed
from mlx_adapters.convert.opening import check_opens
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import AdapterError, AdaptersError
from mlx_adapters.files.writing import folder_bytes, writing
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.generate.text import render
from mlx_adapters.models import load as models
from mlx_adapters.models import sites
from mlx_adapters.models.architectures.table import architecture
from mlx_adapters.models.origin import is_hub_id
from mlx_adapters.models.own_template import FILE

__all__ = ["HUB_DATA", "Exported", "Verdict", "base_name", "export", "verify"]

_PROMPTS = (
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "The capital of France is",
    "Below is an instruction that describes a task.",
)
_NEW_TOKENS = 20
# As `mlx-adapters generate`: what a file leaves out, transformers takes from the base's.
_LIKELIEST = {"do_sample": False, "repetition_penalty": 1.0}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
HUB_DATA = re.compile(r"([\w.-]+/[\w.-]+) \(\w+\)")
"""How an adapter remembers training data of the hub: `OWNER/NAME (split)`."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    tensors: int
    bytes: int
    base: str
    opened: str = ""
    """What PyTorch said of it, where the architecture is not one that the tests compare."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the adapter in PyTorch compares with the adapter in MLX, in float32 on the same base.

    `peft_diff` is max|logit difference| through `PeftModel.from_pretrained`, `auto_diff` through
    `AutoModelForCausalLM.from_pretrained(adapter folder)`, None where transformers does not offer that for
    the method; `bound` is 1e-5 + 1e-5 * max|logit|.
    `effect` is the negative control: how far the logits move when the adapter is left out. `answer_equal`:
    whether transformers' `generate`, with the folder's `generation_config.json`, answers a question with the
    tokens that are written here, and ends there; None where the folder has no such file.
    """

    peft_diff: float
    auto_diff: float | None
    bound: float
    effect: float
    greedy_equal: bool
    tokens: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    answer_equal: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether every comparison held. The effect is a control of the test, not a property to demand."""
        close = max(self.peft_diff, self.auto_diff or 0.0) <= self.bound
        equal = self.greedy_equal and self.answer_equal is not False
        return close and equal and not self.missing and not self.unexpected

    def __str__(self) -> str:
        """The comparison in one line."""
        keys = "no missing and no unexpected key"
        if self.missing or self.unexpected:
            keys = f"{len(self.missing)} missing and {len(self.unexpected)} unexpected keys"
        auto = "" if self.auto_diff is None else f", {self.auto_diff:.1e} through AutoModelForCausalLM"
        answer = {True: "; an answer equal", False: "; an answer NOT EQUAL", None: ""}[self.answer_equal]
        return (
            f"verify: {keys}; max |logit difference| {self.peft_diff:.1e} through PeftModel{auto} "
            f"(bound {self.bound:.1e}); "
            f"{self.tokens} greedy tokens {'equal' if self.greedy_equal else 'NOT EQUAL'}{answer}; without "
            "the "
            f"adapter the logits move by {self.effect:.2g}: {'passed' if self.passed else 'FAILED'}"
        )


def export(source: Path, dst: Path, *, base: str | None = None) -> Exported:
    """Write the adapter in `source` to `dst` as a PEFT folder with a model card.

    `base` is the hub id (or path) that PyTorch users will load the base from; by default the one that the
    adapter remembers. Nothing written names a folder of this machine. Raises AdapterError for a folder that
    is no adapter or remembers no hub id, OutputError for a `dst` that is not empty.
    """
    source = adapter.located(source)
    adapter.refuse_links(source)
    refuse_mlx_lm(source)
    meta = adapter.read_meta(source)
    fields = adapter.read_fields(source)
    fields["base_model_name_or_path"] = base = base_name(source, fields, base)
    tensors = adapter.read_tensors(source)
    if any(name.endswith(".experts") for name in tensors):
        raise AdapterError(
            f"{source}: adapts stacked experts matrix by matrix, which PEFT does not. Write a checkpoint "
            "with mlx-adapters fuse, or an adapter for MLX with --format mlx-lm"
        )
    _refuse_unreadable(source, meta, tensors)
    with writing(dst) as folder:
        _write_json(folder / adapter.CONFIG, fields)
        if not (source / adapter.WEIGHTS).exists():  # a `.bin`
            mx.save_safetensors(str(folder / adapter.WEIGHTS), tensors, metadata={"format": "pt"})
        for name in (adapter.WEIGHTS, adapter.META, adapter.SEEN, FILE):
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        if meta.chat.stops:
            _write_json(folder / GENERATION, {"eos_token_id": list(meta.chat.stops.values()), **_LIKELIEST})
        if (source / "members").is_dir():  # a fusion keeps the adapters it is made of
            shutil.copytree(source / "members", folder / "members")
        shutil.copyfile(Path(__file__).with_name("load_adapter.py"), folder / "load_adapter.py")
        for file in folder.rglob(adapter.META):
            _forget_paths(file)
        for file in (folder / "members").rglob(adapter.CONFIG):
            _write_json(file, adapter.read_fields(file.parent) | {"base_model_name_or_path": base})
        training = meta.training | (
            {"data": public(str(data))} if (data := meta.training.get("data")) else {}
        )
        (folder / "README.md").write_text(adapter_card(meta, base, training), encoding="utf-8")
        opened = _opened(folder, meta)
    return Exported(dst, len(tensors), folder_bytes(dst), base, opened)


def _opened(folder: Path, meta: adapter.AdapterMeta) -> str:
    """Let PyTorch open what the tests do not."""
    row = architecture(meta.base.get("model_type", ""))
    if row.checked or not meta.method.IN_PEFT or not meta.method.AUTO_MODEL:
        return ""
    path = meta.base.get("path")
    return check_opens(folder, Path(path) if path else None)


def base_name(source: Path, fields: dict[str, Any], base: str | None) -> str:
    """The base as others load it: what was given, else the hub id in `fields`; AdapterError where that is
    none, but a folder of this machine."""
    named = base or fields.get("base_model_name_or_path")
    if base is None and not (isinstance(named, str) and is_hub_id(named)):
        raise AdapterError(
            f"{source}: names its base {named or 'not at all'}, which others cannot load. "
            "Give its hub id with --base OWNER/NAME"
        )
    return str(named)


def public(data: str) -> str:
    """Where training data came from, for strangers: of a file its name, and not this machine's folders."""
    return data if HUB_DATA.fullmatch(data) else data.replace("\\", "/").rpartition("/")[2]


def _forget_paths(file: Path) -> None:
    """Leave out of mlx_adapters.json where base and data lay on this machine."""
    meta: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if isinstance(meta.get("base"), dict):
        meta["base"].pop("path", None)
        if not is_hub_id(str(meta["base"].get("_name_or_path", ""))):
            meta["base"].pop("_name_or_path", None)
    if isinstance(meta.get("training"), dict) and "data" in meta["training"]:
        meta["training"]["data"] = public(str(meta["training"]["data"]))
    _write_json(file, meta)


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _refuse_unreadable(source: Path, meta: adapter.AdapterMeta, tensors: dict[str, mx.array]) -> None:
    """AdapterError for layers at which PEFT does not open the method."""
    if not meta.method.IN_PEFT:
        return
    model_type = meta.base.get("model_type", "")
    try:
        paths, _ = adapter.by_layer(tensors, type(meta.method), model_type, source, plain=True)
    except AdapterError as error:
        raise AdapterError(f"{error}. Write it anew first: mlx-adapters import SRC DST") from None
    if found := closed(
        meta.method.NAME,
        model_type,
        [sites.to_hf(path, model_type) for path in paths],
        measured=bool(meta.names),
        dense=_dense(meta.base.get("path")),
    ):
        more = " ..." if len(found) > 6 else ""
        raise AdapterError(
            f"{source}: PEFT opens no {meta.method.NAME} on {', '.join(found[:6])}{more} of a {model_type} "
            "model. Write a checkpoint with mlx-adapters fuse, or an adapter for MLX with --format mlx-lm, "
            "or train with other targets"
        )


def _dense(base: str | None) -> bool:
    """Whether the base is here, and has no experts."""
    try:
        config = models.read_config(Path(base)) if base else None
    except AdaptersError:
        return False
    if config is None:
        return False
    text = config.get("text_config") or config
    return not any(text.get(name) for name in _EXPERTS)


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
        auto = meta.method.AUTO_MODEL
        loaded.model.eval()
        ours = logits(loaded.model, prompts)
        greedy = [_greedy(loaded.model, ids) for ids in prompts]
        asked = _asked(loaded, meta, folder)
        with quiet_transformers():
            return _compare(copy, base, prompts, plain, ours, greedy, asked, auto_offered=auto)


@dataclass(frozen=True)
class _Asked:
    """The prompt of a question, the answer here up to a token of `stop`, and the folder whose generation
    settings PyTorch answers it with."""

    prompt: list[int]
    answer: list[int]
    stop: frozenset[int]
    folder: Path


def _asked(loaded: models.LanguageModel, meta: adapter.AdapterMeta, folder: Path) -> _Asked | None:
    """A question, asked as the adapter was trained; None where the folder says nothing of answers."""
    if not (folder / GENERATION).exists():
        return None
    question = render(loaded, [{"role": "user", "content": _PROMPTS[0]}], adapter=meta)
    stop = frozenset(int(end) for end in question.tokenizer.eos_token_ids)
    options: dict[str, Any] = {"stop": stop, "max_tokens": _NEW_TOKENS}
    ((_, answer),) = generate_ids(loaded.model, [question.ids], **options)
    return _Asked(question.ids, answer, stop, folder)


def _same_answer(model: Any, asked: _Asked) -> bool | None:
    """Whether transformers' `generate` writes it too; None for virtual tokens, which PEFT generates with on
    some architectures only."""
    import torch
    from transformers import GenerationConfig

    if model.active_peft_config.is_prompt_learning:
        return None
    settings = GenerationConfig.from_pretrained(asked.folder, max_new_tokens=_NEW_TOKENS)
    prompt = torch.tensor([asked.prompt])
    found = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
    )[0, len(asked.prompt) :].tolist()
    return (found[:-1] if found and found[-1] in asked.stop else found) == asked.answer


def _compare(
    folder: Path,
    base: Path,
    prompts: list[list[int]],
    plain: list[np.ndarray],
    ours: list[np.ndarray],
    greedy: list[list[int]],
    asked: _Asked | None,
    *,
    auto_offered: bool,
) -> Verdict:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    def opened(path: Path) -> Any:
        return (
            auto_class(base)
            .from_pretrained(path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False)
            .eval()
        )

    peft_model = PeftModel.from_pretrained(opened(base), folder).eval()
    missing, unexpected = _strict(peft_model, load_file(folder / adapter.WEIGHTS), opened(base))
    with torch.no_grad():
        theirs = [peft_model(torch.tensor([ids])).logits[0, -len(ids) :].numpy() for ids in prompts]
        tokens = [_torch_greedy(peft_model, ids) for ids in prompts]
        equal = _same_answer(peft_model, asked) if asked else None
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
        answer_equal=equal,
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
