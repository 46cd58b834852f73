"""One row per method and one per architecture: the tests run every pair."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method with the fields the tests use; `identity` says whether a fresh adapter is the base."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    mergeable: bool = True


METHODS = {
    "lora": Method("lora", {"rank": 4, "alpha": 12.0, "targets": "all-linear"}),
    "lora-default-targets": Method("lora", {"rank": 3, "alpha": 8.0}),
    "lora-rslora": Method("lora", {"rank": 4, "alpha": 6.0, "rslora": True, "targets": "attn"}),
    "lora-last-layer": Method("lora", {"rank": 2, "targets": "mlp", "layers": "last:1"}),
}

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gptj", "gpt_neox", "phi", "phi3")
