"""What an adapter folder says of itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_adapters import methods
from mlx_adapters.adapter.located import located
from mlx_adapters.adapter.reading import CONFIG, META, SEEN, read_fields, read_json
from mlx_adapters.errors import AdapterError, reading
from mlx_adapters.methods.base import Method
from mlx_adapters.methods.peft_fields import check_fields
from mlx_adapters.models import own_template
from mlx_adapters.models.origin import is_hub_id
from mlx_adapters.models.own_template import OWN, ChatTemplate

__all__ = ["AdapterMeta", "read_meta"]


@dataclass(frozen=True)
class AdapterMeta:
    """What is known of an adapter besides its tensors.

    Args:
        method: The method with its options.
        base: The base model: `model_type`, sizes, `_name_or_path` and `revision` on the hub, `path` here.
        template: The prompt template of the training; empty where PEFT wrote the folder.
        loss_on: What the loss was taken on.
        seen: Hashes of the training questions.
        training: The settings of the run and what became of its data.
        names: Where its tensors are under other names than the base's, or as parts of others: `tensors`
            (`mlx_adapters.models.names`), `paths` and what `peft` is told of them.
        chat: How chats were written in training, where the tokenizer alone would write them otherwise.
    """

    method: Method
    base: dict[str, Any]
    template: str = ""
    loss_on: str = ""
    seen: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    chat: ChatTemplate = OWN

    @property
    def hub_id(self) -> str | None:
        """The hub id that the base is known by, if there is one."""
        name = self.base.get("_name_or_path")
        return name if isinstance(name, str) and is_hub_id(name) else None


def read_meta(folder: str | Path) -> AdapterMeta:
    """What an adapter folder or hub id says of itself. Raises AdapterError naming the file and the field."""
    folder = located(folder)
    fields = read_fields(folder)
    if not isinstance(fields.get("peft_type"), str):
        raise AdapterError(
            f"{folder / CONFIG}: field 'peft_type' is missing, so the method is unknown. If it is "
            "AdapterHub's: mlx-adapters import SRC DST --model MODEL"
        )
    with reading(folder / CONFIG, AdapterError):
        kind = methods.claiming(fields)
        if kind.PEFT_FIELDS is not None:
            check_fields(fields, kind.PEFT_FIELDS)
        method = kind.from_peft(fields)
    file = folder / own_template.FILE
    text = own_template.read_template(file, AdapterError) if file.is_file() else ""
    if not (folder / META).exists():
        name = fields.get("base_model_name_or_path")
        chat = ChatTemplate(text, origin=str(file))
        return AdapterMeta(method=method, base={"_name_or_path": name} if name else {}, chat=chat)
    about = read_json(folder / META, "")
    about.pop("mlx_adapters", None)
    if about.get("method") != kind.NAME:
        raise AdapterError(
            f"{folder / CONFIG}: describes {kind.NAME} (peft_type, use_dora), but {META} says "
            f"{about.get('method')}: one of the two was changed"
        )
    with reading(folder / META, AdapterError):
        about["method"] = method = kind(**about.pop("config"))
        _must_agree(fields, method.to_peft() | about.get("names", {}).get("peft", {}), folder)
    # a fusion counts the questions that its members have seen as its own
    seen = sorted({item for file in folder.rglob(SEEN) for item in file.read_text().split()})
    with reading(folder / META, AdapterError):
        chat = own_template.from_record(about.pop("chat", None), text, str(file))
        return AdapterMeta(**about, seen=seen, chat=chat)


# What PyTorch computes with: the file it reads and ours must not say different things.
_COMPUTED = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("bias", "lora_bias", "trainable_token_indices"),
)


def _must_agree(fields: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    for name in _COMPUTED:
        if (found := fields.get(name) or None) != (expected := ours.get(name) or None):
            raise AdapterError(
                f"{folder / CONFIG}: {name} is {found!r}, but by {META} it is {expected!r}: one of the two "
                "was changed"
            )
