"""One row per method and one per architecture: the tests run every pair."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method with the fields the tests use.

    `identity`: a fresh adapter is the base. `refused`: architecture -> words of the refusal; on every other
    architecture the method must work.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    mergeable: bool = True
    refused: dict[str, str] = field(default_factory=dict)


METHODS = {
    "lora": Method("lora", {"rank": 4, "alpha": 12.0, "targets": "all-linear"}),
    "lora-default-targets": Method("lora", {"rank": 3, "alpha": 8.0}),
    "lora-rslora": Method("lora", {"rank": 4, "alpha": 6.0, "rslora": True, "targets": "attn"}),
    "lora-last-layer": Method("lora", {"rank": 2, "targets": "mlp", "layers": "last:1"}),
}

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gptj", "gpt_neox", "phi", "phi3")


def pairs(*, mergeable: bool = False, peft: bool | None = None) -> list[tuple[str, str]]:
    """(case, architecture) for every pair that must work."""
    from mlx_adapters import methods

    return [
        (case, arch)
        for case, method in METHODS.items()
        for arch in ARCHITECTURES
        if arch not in method.refused
        and (method.mergeable or not mergeable)
        and (peft is None or methods.in_peft(method.name) == peft)
    ]


def refusals() -> list[tuple[str, str]]:
    """(case, architecture) for every pair that must be refused, with the reason in the row."""
    return [(case, arch) for case, method in METHODS.items() for arch in method.refused]
