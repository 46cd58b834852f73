"""Tiny models of the families people adapt, written by transformers: what every claim about one is tried on.

A family is a `model_type` with a realistic structure in the small: both kinds of layers in hybrids, windows
that the test text passes, head widths that are not width / heads, the rope and the scaling that the released
models have, biases where they have them. `family_fields` has the fields; a name may be `model_type:variant`.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from family_fields import FAMILIES, WRAPPERS
from tiny import make_tokenizer

__all__ = [
    "FAMILIES",
    "TEXT",
    "WRAPPERS",
    "in_float64",
    "leave_out_towers",
    "make_family",
    "model_type_of",
    "opened",
]

TEXT = [[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [30, 11, 45, 9, 8, 60, 6, 5, 33, 3, 21, 9, 8, 7]]
"""Two texts of 14 tokens: longer than every window of the table."""

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model_type_of(name: str) -> str:
    """The `model_type` of a family's name."""
    return name.partition(":")[0]


def make_family(name: str, folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a tiny random model of the family, and its tokenizer, to `folder`/`name`; returns that folder.

    `fields` override those of the language model's configuration. The model and config.json are written by
    transformers in float32, in the form that its version has.
    """
    import torch
    from transformers import AutoConfig

    torch.manual_seed(seed)
    leave_out_towers()
    model_type = model_type_of(name)
    # copies: some configurations change the objects that they are given
    if name in WRAPPERS:
        values = deepcopy(WRAPPERS[name])
        values["text_config"] |= _IDS | fields
    else:
        values = deepcopy(FAMILIES[name]) | _IDS | fields
    model = _built(AutoConfig.for_model(model_type, **values), name in WRAPPERS)
    _randomise(model)
    target = Path(folder) / name.replace(":", "-")
    model.float().save_pretrained(target)
    make_tokenizer(target)
    return target


def _built(config: Any, wrapper: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    return kind.from_config(config, attn_implementation="eager")


def leave_out_towers() -> None:
    """Gemma 3n's tower of images is in the package timm: its model is made without both of its towers."""
    import torch
    from transformers.models.gemma3n import modeling_gemma3n

    class OnlyText(modeling_gemma3n.AutoModel):  # type: ignore[misc]
        @classmethod
        def from_config(cls, config: Any, **more: Any) -> Any:
            text = config.model_type == "gemma3n_text"
            return super().from_config(config, **more) if text else torch.nn.Identity()

    modeling_gemma3n.AutoModel = OnlyText


def _randomise(model: Any) -> None:
    """Move every array away from its start: what is dropped, or read as its default, shows in the logits.

    Matrices are some five times as wide as transformers draws them, which gives logits of size 1 to 10.
    """
    import torch

    kept = set(model.state_dict())
    buffers = [(name, array) for name, array in model.named_buffers() if name in kept]
    with torch.no_grad():
        for name, array in [*model.named_parameters(), *buffers]:
            if not array.is_floating_point():
                continue
            noise = torch.randn_like(array) * 0.15
            # vectors (norms, biases, a state's decay) keep the size that they start with
            starts = array.ndim < 2 or name.endswith(("A_log", ".D", "dt_bias"))
            array.copy_(array + noise if starts else noise)


def in_float64(network: Any) -> Any:
    """The same model of torch in float64; the kernel of experts has none, their loop has."""
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    if hasattr(inner, "set_experts_implementation"):
        inner.set_experts_implementation("eager")
    return network.double()


def opened(folder: Path, *, told: bool = False) -> Any:
    """The model in `folder` in transformers, ready to compare with; with `told` also what transformers says
    of missing and unexpected names.

    It has the class that AutoModelForCausalLM gives, which is PEFT's too, or that which it was saved as.
    """
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    leave_out_towers()
    config = json.loads((folder / "config.json").read_text())
    (saved,) = config["architectures"]
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"], saved)
    network, said = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return (network.eval(), said) if told else network.eval()
