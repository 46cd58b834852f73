"""Every architecture that mlx-lm or this package has a model file for: tried, or refused with its reason."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import samples
import trials
from cases import sampled
from mlx.utils import tree_flatten, tree_unflatten
from typer.testing import CliRunner

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import call as virtual
from mlx_adapters.cli.app import app
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.generate import prefill
from mlx_adapters.models import corrections, limits, sites
from mlx_adapters.models.architectures import table
from mlx_adapters.models.architectures.table import with_layers
from mlx_adapters.models.discover import architecture_of, discover

METHODS = ("lora", "series", "parallel")

# What cannot be built or run on a CPU without more packages: words of the reason.
NOT_HERE = {"bitnet": "Metal", "muse_spark": "Metal", "olmo": "ai2-olmo"}
_UNDIFFERENTIABLE = {"deepseek_v41": "Cannot calculate VJP"}  # the model file lacks a stop_gradient
_PACKED = {"prism_hadamard_qwen35": "no linear layer"}  # all its linear layers are of its own packed kind
# By method: architecture -> words of the reason. Every other pair must work.
REFUSED: dict[str, dict[str, str]] = {
    "lora": _UNDIFFERENTIABLE | _PACKED,
    "parallel": _UNDIFFERENTIABLE | _PACKED,
    "series": _UNDIFFERENTIABLE
    | _PACKED
    | dict.fromkeys(("mamba", "mamba2"), "no linear layer")
    | dict.fromkeys(
        (
            *("ernie4_5_moe", "gpt_oss", "granitemoe", "jamba", "lfm2_moe", "mellum", "minimax", "mixtral"),
            *("olmoe", "phimoe", "phixtral", "qwen3_moe", "qwen3_vl_moe"),
        ),
        "experts are stacked",
    ),
}
ARCHITECTURES = [name for name in samples.architectures() if name not in NOT_HERE]


def logits(network: nn.Module) -> np.ndarray:
    found = np.array(network(samples.IDS).astype(mx.float32))
    return np.where(np.isneginf(found), 0, found)  # phi3small rules its unused tokens out


def bound(expected: np.ndarray) -> float:
    return float(1e-5 + 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_cannot_run_here_says_why(name: str) -> None:
    if name != "olmo" and mx.metal.is_available():
        pytest.skip("Metal is here")
    with pytest.raises(UnsupportedError, match=NOT_HERE[name]):
        samples.sample(name)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"'lama'\. Did you mean 'llama'"):
        samples.sample("lama")


def test_the_table_has_a_sample_of_each_row() -> None:
    assert {samples.file_of(name) for name in with_layers()} <= set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_text_is_read_alike_at_once_token_by_token_and_in_a_batch(name: str) -> None:
    """With windows, shared keys and states: state-space layers read padding, gemma3n needs a cache."""
    assert trials.fault(name) is None


def _without(module: Any, fix: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, fix, value)


def _gemma3n_without_cache(patch: pytest.MonkeyPatch) -> None:
    """Its row gives it a cache; `needs_cache` would find that it needs one."""
    patch.setitem(table.ARCHITECTURES, "gemma3n", replace(table.architecture("gemma3n"), corrections=()))
    patch.setattr(virtual, "needs_cache", lambda *_: False)


@pytest.mark.parametrize(
    ("name", "undo", "said"),
    [
        (
            "phi3small",
            _without(corrections, "_causal", lambda base: base),
            "otherwise at once than token by token",
        ),
        ("gemma3n", _gemma3n_without_cache, "otherwise at once than token by token"),
        (
            "mamba",
            _without(prefill, "_reads_rows_apart", lambda _: True),
            "a padded batch gives other answers",
        ),
    ],
    ids=["phi3small", "gemma3n", "mamba"],
)
def test_what_mlx_lm_computes_wrong_is_told_for_every_method(
    name: str, undo: Callable[[pytest.MonkeyPatch], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be without our corrections, or with an mlx-lm that has another such fault."""
    undo(monkeypatch)
    reasons = trials.support(name)
    assert set(reasons) == set(methods.names())
    assert all(reason and said in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("method", "name"), sampled([(method, name) for method in METHODS for name in ARCHITECTURES], every=3)
)
def test_a_method_works_or_says_why_not(method: str, name: str) -> None:
    """Placed with default targets, it takes a step of training from the loss that an answer has, on a padded
    batch, and every array moves; the base is changed only by training."""
    reason = trials.trial(name, method)
    if words := REFUSED[method].get(name):
        assert reason is not None
        assert words in reason
        return
    assert reason is None
    base = logits(samples.sample(name))
    fresh = trials.attached(name, method)
    fresh.eval()
    np.testing.assert_allclose(logits(fresh), base, atol=bound(base))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "prism_hadamard_qwen35"])
def test_every_linear_layer_can_be_wrapped(name: str) -> None:
    """No layer among them whose weight the model reads, or which returns something else than an array."""
    network = samples.sample(name)
    base, wanted = logits(network), list(sites.linears(network))
    config = methods.make("lora", {"targets": "all-linear", "rank": 2})
    placed = adapter.attach(network, config, model_type=samples.sample_config(name)["model_type"])
    network.eval()
    assert list(placed) == wanted != []
    np.testing.assert_allclose(logits(network), base, atol=bound(base))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roles_reach_every_block_and_no_router(name: str) -> None:
    """Default targets are in every block that mixes tokens, and each name of a row means something."""
    network = samples.sample(name)
    assert limits.vocabulary(network) == samples.sample_config(name)["vocab_size"]
    row, linears = architecture_of(network, name), list(sites.linears(network))
    if name in _PACKED:
        assert not row.lora
        return
    for names in (row.attn, row.mlp, row.lora, row.parallel, row.ia3):
        assert all(any(sites.matches(path, part) for path in linears) for part in names)

    def blocks(names: tuple[str, ...]) -> set[str]:
        found = [path for path in linears if any(sites.matches(path, part) for part in names)]
        return {path[: path.index(f".{sites.layer_index(path)}.") + 3] for path in found}

    assert blocks(row.lora) == blocks(row.parallel) == blocks(row.attn) != set()
    chosen = [path for path in linears for part in (*row.attn, *row.mlp) if sites.matches(path, part)]
    assert len(chosen) == len(set(chosen)), "a layer has one role"
    few = ("router", ".gate", "classifier", "indexer", "wg", "coefficient", "altup", "shared_expert_gate")
    assert not [path for path in chosen for word in few if path.endswith(word) or f"{word}." in path]
    outs = (row.attn_out, *row.other_outs) + ((row.mlp_out,) if row.mlp_out else ())
    assert set(outs) <= {*row.attn, *row.mlp}


def test_experts_in_some_blocks_only_leave_no_default_for_the_mlp() -> None:
    paths = ["m.layers.0.mlp.down_proj", "m.layers.1.mlp.gate", "m.layers.0.self_attn.q_proj"]
    dense = discover(paths, [], [])
    mixed = discover(paths, [], ["m.layers.1.mlp.switch_mlp.down_proj"])
    assert (dense["mlp"], dense["mlp_out"]) == (("down_proj",), "down_proj")
    assert (mixed["mlp"], mixed["mlp_out"]) == ((), "")


@pytest.mark.parametrize(
    ("paths", "field", "expected"),
    [
        (["m.h.0.attn.c_proj", "m.h.0.mlp.c_proj"], "mlp", ("mlp.c_proj",)),
        (["m.layers.0.mlp.gate.gate_proj", "m.layers.0.mlp.gate_proj"], "mlp", ("mlp.gate_proj",)),
        (["m.layers.0.self_attn.q_proj", "m.layers.1.mamba.in_proj"], "lora", ("q_proj", "in_proj")),
        (["m.layers.0.attention.odd", "m.layers.0.attention.other"], "lora", ("odd", "other")),
        (["m.layers.0.strange.a", "m.layers.0.strange.b"], "attn", ("a", "b")),
    ],
)
def test_names_mean_the_chosen_layers_and_no_others(
    paths: list[str], field: str, expected: tuple[str, ...]
) -> None:
    assert discover(paths, [], [])[field] == expected


# Its blocks' parts are called one by one: h + mlp(post_attention_layernorm(h)) stands in the model's loop.
_READ = "iquestloopcoder"
NORMED = [
    name
    for name in ARCHITECTURES
    if name not in with_layers()
    and name != _READ
    and architecture_of(samples.sample(name), name).pre_mlp is not None
]


def test_most_architectures_have_a_known_norm_before_the_mlp() -> None:
    assert len(NORMED) > 60


@pytest.mark.parametrize("name", NORMED)
def test_the_norm_before_the_mlp_reads_the_residual_stream(name: str) -> None:
    """An MLP that sees zeros returns zero (without biases): the block's result is then what the norm read."""
    network = samples.sample(name)
    pre_mlp = architecture_of(network, name).pre_mlp
    assert pre_mlp is not None
    network.update(
        tree_unflatten(
            [
                (path, mx.zeros_like(a))
                for path, a in tree_flatten(network.parameters())
                if path.endswith("bias")
            ]
        )
    )
    seen: dict[str, mx.array] = {}
    modules = dict(network.named_modules())
    for path in [path for path in modules if sites.matches(path, pre_mlp)]:
        block = path.rpartition(".")[0]
        record(modules[path], lambda x, y, b=block: seen.update({f"{b} in": x}) or mx.zeros_like(y))
        record(modules[block], lambda x, y, b=block: seen.update({f"{b} out": first(y)}) or y)
    network(samples.IDS)
    blocks = {key.partition(" ")[0] for key in seen}
    assert blocks
    for block in blocks:
        expected = np.array(seen[f"{block} in"])
        np.testing.assert_allclose(np.array(seen[f"{block} out"]), expected, atol=bound(expected))


def first(result: Any) -> mx.array:
    return result[0] if isinstance(result, tuple) else result


def record(module: nn.Module, change: Callable[[mx.array, Any], Any]) -> None:
    """Let `change(input, result)` stand for the module's result."""
    kind: Any = type(module)

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return change(x, kind.__call__(self, x, *args, **kwargs))

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


# Commands --------------------------------------------------------------------------------------------------


def cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_models_prints_what_works_why_not_and_targets() -> None:
    said = cli("models", "llama", "gemma3_text", "mixtral")
    works, targets = re.split(r"\nDefault targets .*\n", said)
    assert "developing" not in said
    assert re.search(rf"\n llama +all {len(methods.names())} +logits, lora, ", works)
    assert re.search(r"\n gemma3_text +all but prefix \(1\) ", works)
    assert re.search(r"\n\(\d\) .*RotatingKVCache", works)
    assert re.search(r"\n\(\d\) .*experts are stacked", works)
    assert re.search(r"\n llama +q_proj v_proj ", targets)
    equal = {line.split()[0]: line for line in works.splitlines() if line.startswith(" ") and line.strip()}
    assert "prefix" in equal["llama"]
    assert "prefix" not in equal["gemma3_text"].replace("all but prefix", ""), "refused, so not compared"


def test_models_as_json_has_a_cell_for_each_method() -> None:
    found = json.loads(cli("models", "gpt2", "olmo", "--json"))
    assert [each["architecture"] for each in found] == ["gpt2", "olmo"]
    assert all(set(each["methods"]) == set(methods.names()) for each in found)
    assert set(found[0]["methods"].values()) == {None}
    assert found[0]["targets"]["lora"] == ["c_attn"]


def test_models_shows_the_table_by_default() -> None:
    found = json.loads(cli("models", "--json"))
    seed = {"llama", "bloom", "gptj", "opt", "gpt_neo", "gpt2", "gpt_neox", "chatglm"}
    assert seed <= {each["architecture"] for each in found} == set(with_layers())
    everything = json.loads(cli("models", "--all", "--json"))
    assert {each["architecture"] for each in everything} == {*with_layers(), *samples.architectures()}


def test_methods_lists_each_with_its_paper() -> None:
    found = {about["method"]: about for about in json.loads(cli("methods", "--json"))}
    assert set(found) == set(methods.names())
    assert all(
        about["what"] and about["authors"] and "arxiv.org" in about["paper"] for about in found.values()
    )
    facts = {name: (a["stands_on"], a["mergeable"], a["in_peft"]) for name, a in found.items()}
    assert facts["lora"] == ("linear layers", True, True)
    assert facts["series"] == ("linear layers", False, False)
    assert facts["prompt"] == ("the embedding", False, True)
    assert facts["prefix"] == ("the cache", False, True)
    assert all(name in cli("methods") for name in methods.names())


def test_methods_shows_the_fields_of_one() -> None:
    said = cli("methods", "lora")
    assert "arxiv.org/abs/2106.09685" in said
    assert re.search(r"rank +8 +rank r", said)
    assert (
        "Unknown method 'lroa'. Did you mean 'lora'?" in CliRunner().invoke(app, ["methods", "lroa"]).stderr
    )


def test_training_on_what_has_no_gradient_is_one_line() -> None:
    """The model file's own error, told as what it means for a run."""
    from mlx_adapters.data.tokens import Example
    from mlx_adapters.train.config import TrainConfig
    from mlx_adapters.train.loop import Run

    (name,) = _UNDIFFERENTIABLE
    network = trials.attached(name, "lora")
    run = Run(network, [Example([1, 2, 3, 4, 5], 1)], config=TrainConfig(steps=1, batch_size=1))
    with pytest.raises(UnsupportedError, match=f"mlx-lm's {name} model cannot be differentiated"):
        next(iter(run))
