"""Several adapters on one base: each choice computes what the adapter computes alone, and PyTorch agrees."""

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import METHODS
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from trained import make_adapter

from mlx_adapters import adapter, methods
from mlx_adapters.adapter.call import call_model, start_cache, virtual_ids
from mlx_adapters.adapter.multi import activate, active, load_adapters, names, rows, unload
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import AdapterError, UnsupportedError
from mlx_adapters.models import load as model

IDS = mx.array([[4, 5, 6, 7, 8, 9], [11, 10, 9, 8, 7, 6], [9, 4, 11, 5, 20, 21]])
LORAS: dict[str, dict[str, Any]] = {
    "wide": {"rank": 4, "alpha": 12.0, "targets": "all-linear"},
    "narrow": {"rank": 2, "alpha": 3.0, "targets": "q_proj,down_proj", "layers": "1"},
    "rs": {"rank": 3, "alpha": 5.0, "rslora": True, "targets": "attn"},
}


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny llama, also in 4 bits, and the tiny gpt2 and gptj."""
    packed = tmp_path_factory.mktemp("packed") / "4bit"
    convert(str(folders["llama"]), packed, bits=4, group_size=32)
    return {arch: folders[arch] for arch in ("llama", "gpt2", "gptj")} | {"llama-4bit": packed}


@pytest.fixture(scope="module")
def loras(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs of different ranks, scales and targets for the tiny llama."""
    root = tmp_path_factory.mktemp("loras")
    return {
        name: make_adapter(bases["llama"], root / name, "lora", fields, seed)
        for seed, (name, fields) in enumerate(LORAS.items())
    }


def answering(folder: Path) -> model.LanguageModel:
    loaded = model.load(folder)
    loaded.model.eval()
    return loaded


def logits(network: nn.Module, ids: mx.array = IDS) -> np.ndarray:
    return np.array(call_model(network, ids))


def alone(base: Path, folder: Path | None) -> np.ndarray:
    """The logits of the base with that one adapter, loaded the plain way."""
    loaded = answering(base)
    if folder is not None:
        adapter.load(loaded, folder)
        loaded.model.eval()
    return logits(loaded.model)


def bound(expected: np.ndarray) -> float:
    return float(1e-5 + 1e-5 * np.abs(expected).max())


def test_switching_gives_each_adapter_and_the_base_bit_for_bit(
    bases: dict[str, Path], loras: dict[str, Path]
) -> None:
    expected = {name: alone(bases["llama"], folder) for name, folder in loras.items()}
    expected_base = alone(bases["llama"], None)
    loaded = answering(bases["llama"])
    arrays = {name: id(array) for name, array in tree_flatten(loaded.model.parameters())}
    metas = load_adapters(loaded, loras)
    assert [meta.method.rank for meta in metas.values()] == [4, 2, 3]
    assert names(loaded.model) == list(loras)
    assert active(loaded.model) == ()
    assert np.array_equal(logits(loaded.model), expected_base)
    for name in ("wide", "narrow", "wide", "rs"):
        activate(loaded.model, name)
        assert active(loaded.model) == (name,)
        assert np.array_equal(logits(loaded.model), expected[name])
        assert np.abs(expected[name] - expected_base).max() > 1e-2
    activate(loaded.model, None)
    assert np.array_equal(logits(loaded.model), expected_base)
    # the very same arrays, under the same names: one base in memory, and nothing left in its tree
    assert {name: id(array) for name, array in tree_flatten(loaded.model.parameters())} == arrays


def test_an_active_adapter_shares_the_arrays_of_the_base(
    bases: dict[str, Path], loras: dict[str, Path]
) -> None:
    loaded = answering(bases["llama"])
    before = {id(array) for _, array in tree_flatten(loaded.model.parameters())}
    load_adapters(loaded, loras)
    for which in ("wide", ["wide", "rs"]):
        activate(loaded.model, which)
        assert before <= {id(array) for _, array in tree_flatten(loaded.model.parameters())}


def test_switching_takes_no_time(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, loras)
    fastest = float("inf")
    for name in ["wide", "rs"] * 20:
        started = time.perf_counter()
        activate(loaded.model, name)
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 2e-3
    started = time.perf_counter()
    model.load(bases["llama"])
    assert fastest < (time.perf_counter() - started) / 10


def test_nothing_trains_unless_asked(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, loras)

    def trainable() -> set[str]:
        return {name for name, _ in tree_flatten(loaded.model.trainable_parameters())}

    assert trainable() == set()
    activate(loaded.model, "wide")
    assert trainable() == set()
    activate(loaded.model, "narrow", train=True)
    single = answering(bases["llama"])
    adapter.load(single, loras["narrow"])
    assert trainable() == {name for name, _ in tree_flatten(single.model.trainable_parameters())}
    assert len(trainable()) == 4
    activate(loaded.model, "wide", train=True)
    assert not any("base" in name for name in trainable())
    for which in ("rs", None, ["wide", "rs"]):
        activate(loaded.model, which)
        assert trainable() == set()
    with pytest.raises(UnsupportedError, match="cannot train at once"):
        activate(loaded.model, ["wide", "rs"], train=True)


def test_loading_keeps_what_is_active(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, {"wide": loras["wide"]})
    activate(loaded.model, "wide", train=True)
    expected = logits(loaded.model)
    trains = [name for name, _ in tree_flatten(loaded.model.trainable_parameters())]
    load_adapters(loaded, {"rs": loras["rs"]})
    assert active(loaded.model) == ("wide",)
    assert [name for name, _ in tree_flatten(loaded.model.trainable_parameters())] == trains
    assert np.array_equal(logits(loaded.model), expected)


def test_the_mode_of_the_model_is_that_of_the_adapter_that_becomes_active(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    fields = {"rank": 4, "dropout": 0.5}
    folder = make_adapter(bases["llama"], tmp_path / "a", "lora", fields, 1)
    loaded = model.load(bases["llama"])
    loaded.model.train()
    load_adapters(loaded, {"a": folder})
    activate(loaded.model, "a")
    assert not np.array_equal(logits(loaded.model), logits(loaded.model))
    activate(loaded.model, None)
    loaded.model.eval()
    activate(loaded.model, "a")
    assert np.array_equal(logits(loaded.model), logits(loaded.model))


# Stacks ----------------------------------------------------------------------------------------------------


def test_a_stack_of_loras_adds_them_up(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    """Against the base with both updates merged into its weights."""
    expected_of = answering(bases["llama"])
    for folder in (loras["wide"], loras["rs"]):
        adapter.load(expected_of, folder)
        merged = [(path, layer.merge()) for path, layer in adapter.layers(expected_of.model).items()]
        expected_of.model.update_modules(tree_unflatten(merged))
    expected = logits(expected_of.model)
    loaded = answering(bases["llama"])
    load_adapters(loaded, loras)
    activate(loaded.model, ["wide", "rs"])
    stacked = logits(loaded.model)
    np.testing.assert_allclose(stacked, expected, atol=bound(expected))
    assert np.abs(stacked - alone(bases["llama"], loras["wide"])).max() > 1e-2
    activate(loaded.model, "rs")  # a stack leaves no trace in its members
    assert np.array_equal(logits(loaded.model), alone(bases["llama"], loras["rs"]))


# Rows ------------------------------------------------------------------------------------------------------


def test_each_row_by_its_own_adapter(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, loras)
    which = ["wide", None, ["narrow", "rs"], "narrow", "wide"]
    ids = mx.concatenate([IDS, IDS[:2] + 1])
    expected = []
    for row, choice in enumerate(which):
        activate(loaded.model, choice)
        expected.append(logits(loaded.model, ids[row : row + 1])[0])
    with rows(loaded.model, which):
        mixed = logits(loaded.model, ids)
    for row, (ours, theirs) in enumerate(zip(mixed, expected, strict=True)):
        assert np.abs(ours - theirs).max() <= bound(theirs), which[row]
    assert active(loaded.model) == ("wide",)  # what was active before
    assert np.abs(mixed[0] - logits(loaded.model, ids[:1])[0]).max() <= bound(mixed)
    different = alone(bases["llama"], None)[0]
    assert np.abs(mixed[0] - different).max() > 1e-2


def test_rows_with_a_cache(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, loras)
    with rows(loaded.model, ["rs", None, "wide"]):
        expected = logits(loaded.model)
        cache = make_prompt_cache(loaded.model)
        pieces = [np.array(loaded.model(IDS[:, i : i + 2], cache=cache)) for i in range(0, IDS.shape[1], 2)]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=bound(expected))


def test_rows_are_undone_after_an_error(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, loras)
    activate(loaded.model, "rs")
    before = logits(loaded.model)
    with pytest.raises(AdapterError, match=r"3 rows.*for 2"), rows(loaded.model, ["wide", None]):
        logits(loaded.model)
    assert active(loaded.model) == ("rs",)
    assert np.array_equal(logits(loaded.model), before)


# PyTorch ---------------------------------------------------------------------------------------------------


def test_peft_computes_the_same(bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    """set_adapter, a list of adapters, disable_adapter and the mixed batch of PEFT, on the same files."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = answering(bases["llama"])
    folder = write_transformers(loaded.model, loaded.config, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(theirs, loras["wide"], adapter_name="wide")
    for name in ("narrow", "rs"):
        theirs.load_adapter(loras[name], adapter_name=name)
    theirs.eval()
    load_adapters(loaded, loras)
    ids = torch.tensor(IDS.tolist())

    def same(expected: Any) -> None:
        expected = expected.logits.numpy()
        np.testing.assert_allclose(logits(loaded.model), expected, atol=bound(expected), rtol=0)

    with torch.no_grad():
        for name in ("rs", "wide", "narrow"):
            theirs.set_adapter(name)
            activate(loaded.model, name)
            same(theirs(ids))
        theirs.base_model.set_adapter(["wide", "narrow", "rs"])
        activate(loaded.model, ["wide", "narrow", "rs"])
        same(theirs(ids))
        with theirs.disable_adapter():
            activate(loaded.model, None)
            same(theirs(ids))
        with rows(loaded.model, ["narrow", None, "rs"]):
            same(theirs(ids, adapter_names=["narrow", "__base__", "rs"]))


# Every method ----------------------------------------------------------------------------------------------

PROMPT = ("prompt", "ptuning", "prefix")


@pytest.fixture(scope="module")
def family(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`family(case, base)`: a folder with that case's adapter, made once."""
    root = tmp_path_factory.mktemp("family")

    def get(case: str, base: str = "llama") -> Path:
        folder = root / f"{case}-{base}"
        if not folder.exists():
            make_adapter(bases[base], folder, METHODS[case].name, METHODS[case].settings(bases[base]), 5)
        return folder

    return get


def merged_into(base: Path, folder: Path) -> model.LanguageModel:
    """The base with a mergeable adapter in its weights."""
    loaded = answering(base)
    adapter.load(loaded, folder)
    merged = [(path, layer.merge()) for path, layer in adapter.layers(loaded.model).items()]
    loaded.model.update_modules(tree_unflatten(merged))
    return loaded


def cases(*bases: str) -> list[tuple[str, str]]:
    return [
        (case, base) for case in METHODS for base in bases if base.split("-")[0] not in METHODS[case].refused
    ]


@pytest.mark.parametrize(("case", "arch"), cases("llama", "gptj", "llama-4bit"))
def test_every_method_beside_a_lora(case: str, arch: str, bases: dict[str, Path], family: Any) -> None:
    """Switched bit for bit; in a batch with other rows equal to the row alone, or refused with a reason."""
    loaded = answering(bases[arch])
    load_adapters(loaded, {"lora": family("lora", arch), "other": family(case, arch)})
    expected = {name: alone(bases[arch], family(c, arch)) for name, c in (("lora", "lora"), ("other", case))}
    plain = alone(bases[arch], None)
    for name in ("other", "lora", "other"):
        activate(loaded.model, name)
        assert np.array_equal(logits(loaded.model), expected[name])
    activate(loaded.model, None)
    assert np.array_equal(logits(loaded.model), plain)
    with rows(loaded.model, ["other"] * 3):
        np.testing.assert_allclose(logits(loaded.model), expected["other"], atol=bound(expected["other"]))
    if METHODS[case].name in (*PROMPT, "loreft"):
        reason = "whole blocks" if METHODS[case].name == "loreft" else "virtual tokens"
        with pytest.raises(UnsupportedError, match=reason), rows(loaded.model, ["other", None]):
            pass
        return
    with rows(loaded.model, ["other", None, "lora"]):
        mixed = logits(loaded.model)
    for row, right in zip(mixed, (expected["other"][0], plain[1], expected["lora"][2]), strict=True):
        assert np.abs(row - right).max() <= bound(right)
    assert np.abs(expected["other"][0] - plain[0]).max() > 1e-2


@pytest.mark.parametrize("case", METHODS)
def test_every_method_on_top_of_a_lora(case: str, bases: dict[str, Path], family: Any) -> None:
    """The second adapter's base is the first's layer: as on a base that the first is merged into."""
    loaded = answering(bases["llama"])
    load_adapters(loaded, {"lora": family("lora"), "other": family(case)})
    if METHODS[case].name == "dora":
        with pytest.raises(UnsupportedError, match=r"'other' .dora. reads the weight"):
            activate(loaded.model, ["lora", "other"])
        assert active(loaded.model) == ()
        return
    expected_of = merged_into(bases["llama"], family("lora"))
    adapter.load(expected_of, family(case))
    expected_of.model.eval()
    expected = logits(expected_of.model)
    activate(loaded.model, ["lora", "other"])
    np.testing.assert_allclose(logits(loaded.model), expected, atol=bound(expected))
    assert np.abs(expected - alone(bases["llama"], family("lora"))).max() > 1e-2


@pytest.mark.parametrize("case", [case for case, method in METHODS.items() if method.mergeable])
def test_a_lora_on_top_of_every_method(case: str, bases: dict[str, Path], family: Any) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, {"lora": family("lora-rslora"), "other": family(case)})
    expected_of = merged_into(bases["llama"], family(case))
    adapter.load(expected_of, family("lora-rslora"))
    expected_of.model.eval()
    expected = logits(expected_of.model)
    activate(loaded.model, ["other", "lora"])
    np.testing.assert_allclose(logits(loaded.model), expected, atol=bound(expected))


@pytest.mark.parametrize("case", METHODS)
def test_every_method_trains_by_name_as_alone(case: str, bases: dict[str, Path], family: Any) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, {"lora": family("lora"), "other": family(case)})
    activate(loaded.model, "other", train=True)
    single = answering(bases["llama"])
    adapter.load(single, family(case))
    names_of = [[name for name, _ in tree_flatten(m.model.trainable_parameters())] for m in (loaded, single)]
    assert names_of[0] == names_of[1] != []
    activate(loaded.model, "lora", train=True)
    activate(loaded.model, None)
    assert tree_flatten(loaded.model.trainable_parameters()) == []


def test_generation_starts_with_the_active_prefix_only(bases: dict[str, Path], family: Any) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, {"prefix": family("prefix"), "prompt": family("prompt"), "lora": family("lora")})
    activate(loaded.model, ["prefix", "lora"])
    assert start_cache(loaded.model) is not None
    assert virtual_ids(loaded.model) == []
    activate(loaded.model, "prompt")
    assert start_cache(loaded.model) is None
    assert len(virtual_ids(loaded.model)) == 3
    activate(loaded.model, "lora")
    assert start_cache(loaded.model) is None
    assert virtual_ids(loaded.model) == []
    with pytest.raises(UnsupportedError, match="both put virtual tokens"):
        activate(loaded.model, ["prefix", "prompt"])


# Saving, attaching, refusals -------------------------------------------------------------------------------


def test_saving_writes_the_active_adapter_or_says_why_not(
    bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path
) -> None:
    loaded = answering(bases["llama"])
    metas = load_adapters(loaded, loras)
    for which in (None, ["wide", "rs"]):
        activate(loaded.model, which)
        with pytest.raises(AdapterError, match="activate one"):
            adapter.save(loaded.model, tmp_path / "a", meta=metas["wide"])
    activate(loaded.model, "rs")
    with pytest.raises(AdapterError, match="active adapter is 'rs'"):
        adapter.save(loaded.model, tmp_path / "a", meta=metas["wide"])
    assert not (tmp_path / "a").exists()
    adapter.save(loaded.model, tmp_path / "a", meta=metas["rs"])
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (loras["rs"] / file).read_bytes()


def test_what_would_go_wrong_is_refused(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    with pytest.raises(AdapterError, match="load_adapters"):
        activate(loaded.model, "wide")
    load_adapters(loaded, loras)
    with pytest.raises(AdapterError, match=r"Unknown adapter 'wid'.*Did you mean 'wide'"):
        activate(loaded.model, "wid")
    with pytest.raises(AdapterError, match="twice"):
        activate(loaded.model, ["wide", "wide"])
    with pytest.raises(AdapterError, match="'wide' is taken"):
        load_adapters(loaded, {"wide": loras["rs"]})
    with pytest.raises(AdapterError, match="by name"):
        adapter.attach(loaded, methods.make("lora", {}))
    with pytest.raises(AdapterError, match="empty"), rows(loaded.model, []):
        pass
    with rows(loaded.model, ["wide", None, "rs"]):
        for refused in (
            lambda: activate(loaded.model, "wide"),
            lambda: unload(loaded.model, "narrow"),
            lambda: load_adapters(loaded, {"new": loras["wide"]}),
            lambda: rows(loaded.model, ["rs"]).__enter__(),
        ):
            with pytest.raises(AdapterError):
                refused()
    single = answering(bases["llama"])
    adapter.load(single, loras["wide"])
    with pytest.raises(AdapterError, match="already"):
        load_adapters(single, loras)


def test_all_are_loaded_or_none(bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, {"rs": loras["rs"]})
    activate(loaded.model, "rs")
    foreign = make_adapter(bases["gpt2"], tmp_path / "gpt2", "lora", {}, 1)
    with pytest.raises(AdapterError, match="was trained on a gpt2 model"):
        load_adapters(loaded, {"wide": loras["wide"], "foreign": foreign})
    assert names(loaded.model) == ["rs"]
    assert np.array_equal(logits(loaded.model), alone(bases["llama"], loras["rs"]))


def test_unloading(bases: dict[str, Path], loras: dict[str, Path]) -> None:
    loaded = answering(bases["llama"])
    load_adapters(loaded, loras)
    activate(loaded.model, "rs")
    with pytest.raises(AdapterError, match="'rs' is active"):
        unload(loaded.model, "rs")
    unload(loaded.model, "wide")
    assert names(loaded.model) == ["narrow", "rs"]
    assert np.array_equal(logits(loaded.model), alone(bases["llama"], loras["rs"]))
    activate(loaded.model, None)
    unload(loaded.model, "narrow")
    unload(loaded.model, "rs")
    assert names(loaded.model) == []
    adapter.load(loaded, loras["wide"])  # the model is as if nothing had been
    assert np.array_equal(logits(loaded.model), alone(bases["llama"], loras["wide"]))
