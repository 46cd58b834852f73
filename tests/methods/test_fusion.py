"""AdapterFusion: its formula, what a fresh one is, training, and a folder that loads alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import METHODS
from mlx.utils import tree_flatten
from trained import make_adapter
from typer.testing import CliRunner

from mlx_adapters import adapter, methods
from mlx_adapters.adapter import AdapterMeta, multi
from mlx_adapters.adapter.call import call_model
from mlx_adapters.adapter.combine import combine
from mlx_adapters.cli.app import app
from mlx_adapters.errors import AdapterError, ConfigError, UnsupportedError
from mlx_adapters.methods import Fusion
from mlx_adapters.models import load as model
from mlx_adapters.train.recompute import Recompute
from mlx_adapters.train.trainer import Trainer

IDS = mx.array([[4, 5, 6, 7, 8, 9, 10, 11], [11, 10, 9, 8, 7, 6, 5, 4]])


@pytest.fixture(scope="module")
def base(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs on the same layers and one on fewer."""
    root = tmp_path_factory.mktemp("loras")
    fields: list[dict[str, Any]] = [{"rank": 4}, {"rank": 2, "alpha": 6.0}, {"rank": 3, "targets": "v_proj"}]
    return [make_adapter(base, root / str(i), "lora", f, i) for i, f in enumerate(fields)]


def fused(base: Path, folders: list[Path], **fields: Any) -> tuple[model.LanguageModel, AdapterMeta]:
    loaded = model.load(base)
    config = methods.make("fusion", {"adapters": ",".join(map(str, folders)), **fields})
    about = model.describe(loaded)
    mx.random.seed(0)
    adapter.attach(loaded, config)
    loaded.model.eval()
    return loaded, AdapterMeta(method=config, base=about)


def logits(loaded: model.LanguageModel) -> np.ndarray:
    return np.array(call_model(loaded.model, IDS))


def with_adapter(base: Path, folder: Path | None) -> np.ndarray:
    loaded = model.load(base)
    if folder:
        adapter.load(loaded, folder)
    loaded.model.eval()
    return logits(loaded)


def bound(expected: np.ndarray) -> float:
    return float(1e-5 + 1e-5 * np.abs(expected).max())


def scatter(loaded: model.LanguageModel, size: float = 0.5) -> None:
    """Give every trainable array other values."""
    for layer in adapter.layers(loaded.model).values():
        layer.load_weights(
            {name: size * mx.random.normal(array.shape) for name, array in layer.tensors().items()}
        )


def test_one_layer_computes_the_papers_formula(base: Path, loras: list[Path]) -> None:
    """Attention with the adapters' outputs as keys and values, written out in float64."""
    loaded, _ = fused(base, loras)
    scatter(loaded)
    layer = adapter.layers(loaded.model)["model.layers.1.self_attn.v_proj"]
    weights = {name: np.array(array, np.float64) for name, array in layer.tensors().items()}
    x = mx.random.normal((2, 5, 32))
    h = np.array(layer.base(x), np.float64)
    z = []
    for folder in loras:
        tensors = adapter.read_tensors(folder)
        name = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
        a, b = (np.array(tensors[f"{name}{factor}.weight"], np.float64) for factor in "AB")
        fields = adapter.read_fields(folder)
        z.append(fields["lora_alpha"] / fields["r"] * np.array(x, np.float64) @ a.T @ b.T)
    values = np.stack(z, axis=2)  # [rows, time, adapters, out]
    query = h @ weights["query"].T + weights["query_bias"]
    keys = values @ weights["key"].T + 3.0  # the bias that a key need not have
    scores = np.einsum("rtw,rtnw->rtn", query, keys)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    assert shares.std(axis=-1).mean() > 0.05, "the shares differ, or nothing is tested"
    value = values @ (np.eye(values.shape[-1]) + weights["shift"]).T
    expected = h + np.einsum("rtn,rtnw->rtw", shares, value)
    np.testing.assert_allclose(np.array(layer(x)), expected, atol=1e-5 + 1e-5 * np.abs(expected).max())


def test_a_fresh_fusion_is_nearly_the_mean_of_its_members(
    base: Path, loras: list[Path], tmp_path: Path
) -> None:
    mean = with_adapter(base, combine(loras[:2], [0.5, 0.5], tmp_path / "m", method="cat").path)
    effect = np.abs(mean - with_adapter(base, None)).max()
    loaded, _ = fused(base, loras[:2])
    assert np.abs(logits(loaded) - mean).max() < 0.1 * effect
    for layer in adapter.layers(loaded.model).values():
        layer.query = mx.zeros_like(layer.query)  # equal scores: the mean itself
    np.testing.assert_allclose(logits(loaded), mean, atol=bound(mean))


def test_where_one_adapter_stands_alone_it_counts_whole(base: Path, loras: list[Path]) -> None:
    """q_proj is in the first adapter only here: no attention there, and no parameters for it."""
    loaded, _ = fused(base, [loras[0], loras[2]])
    names = {name for name, _ in tree_flatten(loaded.model.trainable_parameters())}
    alone = {name.rpartition(".")[2] for name in names if ".q_proj." in name}
    shared = {name.rpartition(".")[2] for name in names if ".v_proj." in name}
    assert alone == {"shift"}
    assert shared == {"query", "query_bias", "key", "shift"}
    single = model.load(base)
    adapter.load(single, loras[0])
    x = mx.random.normal((1, 3, 32))
    path = "model.layers.0.self_attn.q_proj"
    np.testing.assert_allclose(
        np.array(adapter.layers(loaded.model)[path](x)),
        np.array(adapter.layers(single.model)[path](x)),
        atol=1e-5,
    )


def test_the_base_is_computed_once(base: Path, loras: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = fused(base, loras)
    layer = adapter.layers(loaded.model)["model.layers.0.self_attn.v_proj"]
    calls = []
    real = nn.Linear.__call__
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: (calls.append(self), real(self, x))[1])
    layer(mx.ones((1, 2, 32)))
    assert calls == [layer.base]


def test_gradient_checkpointing_changes_nothing(base: Path, loras: list[Path]) -> None:
    def gradients(loaded: model.LanguageModel, recompute: Any = lambda f: f) -> dict[str, np.ndarray]:
        def loss() -> mx.array:
            return nn.losses.cross_entropy(call_model(loaded.model, IDS)[:, :-1], IDS[:, 1:]).sum()

        _, grads = recompute(nn.value_and_grad(loaded.model, loss))()
        return {name: np.array(grad) for name, grad in tree_flatten(grads)}

    loaded, _ = fused(base, loras)
    loaded.model.train()
    expected = gradients(loaded)
    for name, gradient in gradients(loaded, Recompute(loaded.model)).items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5 * np.abs(expected[name]).max())


# Every method ----------------------------------------------------------------------------------------------

NOT_LINEAR = ("prompt", "ptuning", "prefix", "ln_tuning", "loreft", "fusion")


@pytest.mark.parametrize("arch", ["llama", "gptj"])
@pytest.mark.parametrize("case", [case for case, method in METHODS.items() if method.name not in NOT_LINEAR])
def test_equal_members_fuse_to_that_member(
    case: str, arch: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever query and key are, the shares of equal outputs sum to one: any method, without a formula."""
    method = METHODS[case]
    one = make_adapter(folders[arch], tmp_path / "one", method.name, method.fields, 1)
    other = Path(shutil.copytree(one, tmp_path / "other"))
    loaded, _ = fused(folders[arch], [one, other], value=False)
    scatter(loaded)
    expected = with_adapter(folders[arch], one)
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    assert np.abs(expected - with_adapter(folders[arch], None)).max() > 1e-2


@pytest.mark.parametrize("other", ["dora", "ia3", "vera", "series", "parallel", "seq_bn"])
def test_members_may_be_of_different_methods(
    other: str, base: Path, loras: list[Path], tmp_path: Path
) -> None:
    fields = {**METHODS[other].fields} | ({"layers": "1"} if other == "seq_bn" else {"targets": "mlp"})
    folder = make_adapter(base, tmp_path / "other", other, fields, 3)
    lora = make_adapter(base, tmp_path / "lora", "lora", {"rank": 2, "targets": "mlp"}, 4)
    loaded, meta = fused(base, [lora, folder])
    scatter(loaded)
    expected = logits(loaded)
    for changed in (lora, folder):
        assert np.abs(expected - with_adapter(base, changed)).max() > 1e-2
    adapter.save(loaded.model, tmp_path / "f", meta=meta)
    again = model.load(base)
    adapter.load(again, tmp_path / "f")
    again.model.eval()
    assert np.array_equal(logits(again), expected)


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix", "ln_tuning", "loreft"])
def test_adapters_on_no_linear_layer_are_refused(
    method: str, base: Path, loras: list[Path], tmp_path: Path
) -> None:
    fields = {} if method in ("ln_tuning", "loreft") else {"num_virtual_tokens": 2}
    folder = make_adapter(base, tmp_path / "p", method, fields, 1)
    with pytest.raises(UnsupportedError, match=f"{method} adapts no linear layer"):
        fused(base, [loras[0], folder])


def test_a_layer_read_by_one_and_adapted_by_another_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-J's seq_bn reads what attention returned: with a LoRA there, which of the two would it be?"""
    lora = make_adapter(folders["gptj"], tmp_path / "lora", "lora", {"rank": 2, "targets": "out_proj"}, 1)
    block = make_adapter(folders["gptj"], tmp_path / "block", "seq_bn", {"reduction_factor": 4}, 1)
    with pytest.raises(UnsupportedError, match="do not go together"):
        fused(folders["gptj"], [lora, block])


# Training and folders --------------------------------------------------------------------------------------


def rows(file: Path) -> Path:
    lines = [{"instruction": "tom has 3 apples", "output": "the answer is 7"}] * 8
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_training_lowers_the_loss_and_the_folder_loads_alone(
    base: Path, loras: list[Path], tmp_path: Path
) -> None:
    members = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in loras]
    (members[0] / "seen.txt").write_text("00000000000000aa\n")
    before = [adapter.read_tensors(folder) for folder in members]
    run = Trainer(
        model.load(base),
        rows(tmp_path / "d.jsonl"),
        Fusion(adapters=",".join(map(str, members))),
        output=tmp_path / "fusion",
        **{"steps": 30, "batch_size": 4, "lr": 0.02, "validation": 0, "template": "alpaca"},
    )
    losses = [step.loss for step in run]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    run.model.model.eval()
    expected = logits(run.model)
    for folder in members:
        shutil.rmtree(folder)
    moved = (tmp_path / "fusion").rename(tmp_path / "elsewhere, with a comma")
    again = model.load(base)
    meta = adapter.load(again, moved)
    again.model.eval()
    assert np.array_equal(logits(again), expected)
    assert "00000000000000aa" in meta.seen, "what a member has seen, the fusion has seen"
    kept = [adapter.read_tensors(folder) for folder in sorted((moved / "members").iterdir())]
    for ours, theirs in zip(kept, before, strict=True):
        assert set(ours) == set(theirs)
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    adapter.save(again.model, tmp_path / "again", meta=meta)  # and it can be handed on
    third = model.load(base)
    adapter.load(third, tmp_path / "again")
    third.model.eval()
    assert np.array_equal(logits(third), expected)


def test_weight_decay_pulls_the_value_to_the_identity(base: Path, loras: list[Path], tmp_path: Path) -> None:
    def distance(decay: float) -> float:
        run = Trainer(
            model.load(base),
            rows(tmp_path / "d.jsonl"),
            Fusion(adapters=",".join(map(str, loras))),
            output=tmp_path / f"decay-{decay}",
            **{"steps": 30, "batch_size": 4, "lr": 0.02, "warmup": 0, "weight_decay": decay},
        )
        list(run)
        return sum(mx.abs(x.shift).sum().item() for x in adapter.layers(run.model.model).values())

    assert distance(10.0) < 0.5 * distance(0.0)


def test_the_command_line_trains_one(base: Path, loras: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["train", str(base), "--data", str(rows(tmp_path / "d.jsonl")), "--output", str(tmp_path / "f")]
        + ["--method", "fusion", "--set", f"adapters={loras[0]},{loras[1]}", "--set", "width=4"]
        + ["--steps", "2", "--validation", "0"],
    )
    assert result.exit_code == 0, result.output
    assert adapter.read_fields(tmp_path / "f")["width"] == 4
    assert sorted(folder.name for folder in (tmp_path / "f" / "members").iterdir()) == ["00", "01"]


def test_a_fusion_among_several(base: Path, loras: list[Path], tmp_path: Path) -> None:
    """By name, and on top of another adapter, whose output its members then work on."""
    loaded, meta = fused(base, loras[:2])
    scatter(loaded)
    adapter.save(loaded.model, tmp_path / "f", meta=meta)
    expected = logits(loaded)
    held = model.load(base)
    held.model.eval()
    multi.load_adapters(held, {"fusion": tmp_path / "f", "plain": loras[2]})
    multi.activate(held.model, "fusion")
    assert np.array_equal(logits(held), expected)
    multi.activate(held.model, ["plain", "fusion"])
    path, x = "model.layers.0.self_attn.v_proj", mx.random.normal((1, 4, 32))
    top = adapter.layers(held.model)[path]
    below = adapter.layers(held.model)[f"{path}.base"]
    lower = np.array(below(x))
    assert np.abs(lower - np.array(below.base(x))).max() > 1e-2
    members = [adapter.layers(single(base, folder).model)[path] for folder in loras[:2]]
    z = np.stack([np.array(member(x) - member.base(x)) for member in members], axis=-2)
    query = lower @ np.array(top.query).T + np.array(top.query_bias)
    shares = mx.softmax(mx.array(np.einsum("rtw,rtnw->rtn", query, z @ np.array(top.key).T)), axis=-1)
    added = np.einsum("rtn,rtnw->rtw", np.array(shares), z)
    wanted = lower + added + added @ np.array(top.shift).T
    np.testing.assert_allclose(np.array(top(x)), wanted, atol=1e-5 + 1e-5 * np.abs(wanted).max())


def single(base: Path, folder: Path) -> model.LanguageModel:
    loaded = model.load(base)
    adapter.load(loaded, folder)
    loaded.model.eval()
    return loaded


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "two or more"),
        ({"adapters": "a"}, "two or more"),
        ({"adapters": "a,b,a"}, "twice"),
        ({"adapters": "a,b", "width": -1}, "width=-1"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        methods.make("fusion", fields)


def test_members_that_do_not_fit(base: Path, loras: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not an adapter folder"):
        fused(base, [loras[0], tmp_path / "nothing"])
    loaded, meta = fused(base, loras[:2])
    adapter.save(loaded.model, tmp_path / "f", meta=meta)
    with pytest.raises(AdapterError, match="is a fusion itself"):
        fused(base, [loras[0], tmp_path / "f"])
    shutil.rmtree(tmp_path / "f" / "members" / "01")
    with pytest.raises(AdapterError, match="1 of the 2 members"):
        adapter.load(model.load(base), tmp_path / "f")


def test_the_cases_make_their_members(base: Path) -> None:
    for case in ("fusion", "fusion-mean"):
        config = methods.make("fusion", METHODS[case].settings(base))
        assert all((folder / "adapter_model.safetensors").exists() for folder in config.members())
    assert not Fusion.IN_PEFT
