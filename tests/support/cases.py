"""One row per method and one per architecture: the slow tests run every pair, the others a sample."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method with the fields the tests use.

    `identity`: a fresh adapter is the base. `refused`: architecture -> words of the refusal; on every other
    architecture the method must work. `prepare(model folder)` makes files that the fields name.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    mergeable: bool = True
    refused: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], dict[str, Any]] | None = None

    def settings(self, base: Path) -> dict[str, Any]:
        """The fields for the model in `base`."""
        return self.fields | (self.prepare(base) if self.prepare else {})


def members(*loras: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    """`adapters` for fusion: trained LoRAs of these fields, made once for each model folder."""

    def prepare(base: Path) -> dict[str, Any]:
        from trained import make_adapter

        folders = []
        for seed, fields in enumerate(loras):
            name = "-".join(str(value) for value in fields.values())
            folder = base.parent / f"{base.name}-member-{seed}-{name}"
            if not folder.exists():
                make_adapter(base, folder, "lora", fields, seed)
            folders.append(str(folder))
        return {"adapters": ",".join(folders)}

    return prepare


METHODS = {
    "lora": Method("lora", {"rank": 4, "alpha": 12.0, "targets": "all-linear"}),
    "lora-default-targets": Method("lora", {"rank": 3, "alpha": 8.0}),
    "lora-rslora": Method("lora", {"rank": 4, "alpha": 6.0, "rslora": True, "targets": "attn"}),
    "lora-last-layer": Method("lora", {"rank": 2, "targets": "mlp", "layers": "last:1"}),
    "lora-pissa": Method("lora", {"rank": 4, "alpha": 6.0, "pissa": True, "targets": "attn"}),
    "lora-patterns": Method(
        "lora",
        {
            "rank": 3,
            "targets": "all-linear",
            "rank_pattern": r".*\.0\..*=5",
            "alpha_pattern": r".*\.1\..*=7",
        },
    ),
    "dora": Method("dora", {"rank": 4, "alpha": 12.0, "targets": "all-linear"}),
    "dora-default-targets": Method("dora", {"rank": 3, "rslora": True}),
    "ia3": Method("ia3"),
    "ia3-all": Method("ia3", {"targets": "all-linear", "feedforward": "none"}),
    "vera": Method("vera", {"rank": 8, "targets": "all-linear"}),
    "ln_tuning": Method("ln_tuning"),
    "series": Method("series", {"bottleneck_size": 6}, mergeable=False),
    "series-p-bert": Method(
        "series",
        {"bottleneck_size": 5, "variant": "P", "init": "bert", "scaling": 4, "non_linearity": "gelu_new"},
        identity=False,
        mergeable=False,
    ),
    "series-all": Method("series", {"bottleneck_size": 4, "targets": "all-linear"}, mergeable=False),
    "parallel": Method("parallel", {"bottleneck_size": 6}, mergeable=False),
    "parallel-learned": Method(
        "parallel",
        {"bottleneck_size": 4, "scaling": "learned", "targets": "all-linear", "non_linearity": "silu"},
        mergeable=False,
    ),
    "double_seq_bn": Method("double_seq_bn", {"reduction_factor": 5}, mergeable=False),
    "seq_bn": Method("seq_bn", {"reduction_factor": 4}, mergeable=False),
    "par_bn": Method("par_bn", mergeable=False, refused={"phi": "no norm before its MLP"}),
    "scaled_par_bn": Method(
        "scaled_par_bn", {"bottleneck_size": 7}, mergeable=False, refused={"phi": "no norm before its MLP"}
    ),
    "prompt": Method("prompt", {"num_virtual_tokens": 3}, identity=False, mergeable=False),
    "prompt-text": Method(
        "prompt",
        {"num_virtual_tokens": 5, "init": "text", "init_text": "tom has", "init_ids": "4,5"},
        identity=False,
        mergeable=False,
    ),
    "loreft": Method("loreft", {"rank": 3}, identity=False, mergeable=False),
    "loreft-last-layer": Method("loreft", {"rank": 1, "layers": "last:1"}, identity=False, mergeable=False),
    "ptuning": Method("ptuning", {"num_virtual_tokens": 4}, identity=False, mergeable=False),
    "ptuning-lstm": Method(
        "ptuning",
        {"num_virtual_tokens": 3, "encoder": "LSTM", "encoder_hidden_size": 8},
        identity=False,
        mergeable=False,
    ),
    "prefix": Method("prefix", {"num_virtual_tokens": 3}, identity=False, mergeable=False),
    "prefix-projection": Method(
        "prefix",
        {"num_virtual_tokens": 4, "projection": True, "encoder_hidden_size": 12},
        identity=False,
        mergeable=False,
    ),
    "fusion": Method(
        "fusion",
        identity=False,
        mergeable=False,
        # the second has layers that the first lacks
        prepare=members({"rank": 4, "targets": "attn"}, {"rank": 2, "targets": "all-linear"}),
    ),
    "fusion-mean": Method(
        "fusion",
        {"width": 6, "value": False},
        identity=False,
        mergeable=False,
        prepare=members({"rank": 4}, {"rank": 2}, {"rank": 1, "alpha": 2.0}),
    ),
}

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi",
    "phi3",
    "gpt2",
    "gptj",
    "gpt_neox",
    "bloom",
    "opt",
    "gpt_neo",
    "glm",
)


def pairs(*, mergeable: bool = False, peft: bool | None = None) -> list[tuple[str, str]]:
    """(case, architecture) for every pair that must work."""
    from mlx_adapters import methods

    return [
        (case, arch)
        for case, method in METHODS.items()
        for arch in ARCHITECTURES
        if arch not in method.refused
        and (method.mergeable or not mergeable)
        and (peft is None or peft == methods.find(method.name).IN_PEFT)
    ]


def sampled(pairs: Sequence[tuple[str, str]], every: int = 5, always: str = "llama") -> list[Any]:
    """The pairs as parameters: the slow run has all, the default run one in `every`, and all of `always`.

    They are chosen along the diagonals of the table, so that each of either kind meets several of the other.
    """
    import pytest

    rows, columns = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    return [
        pytest.param(one, other)
        if other == always or (rows.index(one) + columns.index(other)) % every == 0
        else pytest.param(one, other, marks=pytest.mark.slow)
        for one, other in pairs
    ]


def few(values: Iterable[Any], every: int) -> list[Any]:
    """The values, or tuples of them, as parameters: the slow run has all, the default run one in `every`.

    Of a product, every list whose length has no divisor in common with `every` is met in full.
    """
    import pytest

    slow = pytest.mark.slow
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow if number % every else ())
        for number, value in enumerate(values)
    ]


def refusals() -> list[tuple[str, str]]:
    """(case, architecture) for every pair that must be refused, with the reason in the row."""
    return [(case, arch) for case, method in METHODS.items() for arch in method.refused]
