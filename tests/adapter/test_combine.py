"""Weighted merges of LoRA adapters against PEFT's, on the same files; and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_adapters import adapter
from mlx_adapters.adapter.call import call_model
from mlx_adapters.adapter.combine import COMBINATIONS, _largest, _Noise, combine
from mlx_adapters.cli.app import app
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import AdapterError, ConfigError, OutputError
from mlx_adapters.methods import LoRA
from mlx_adapters.models import load as model

IDS = mx.array([[4, 5, 6, 7, 8, 9, 10, 11], [11, 10, 9, 8, 7, 6, 5, 4]])
LORAS: dict[str, dict[str, Any]] = {
    "a": {"rank": 4, "alpha": 12.0, "targets": "q_proj,v_proj,down_proj"},
    "b": {"rank": 4, "alpha": 2.0, "targets": "attn", "layers": "1"},
    "c": {"rank": 4, "alpha": 6.0, "targets": "q_proj,o_proj"},
    "small": {"rank": 2, "alpha": 3.0, "targets": "attn"},
    "rs": {"rank": 4, "alpha": 5.0, "rslora": True, "targets": "q_proj"},
}


def make_lora(base: Path, folder: Path, fields: dict[str, Any], seed: int, **about: Any) -> Path:
    """A LoRA folder with nothing at its start: every entry is random, none equal to another."""
    loaded = model.load(base)
    config = LoRA(**fields)
    described = model.describe(loaded)
    mx.random.seed(seed)
    adapter.attach(loaded, config)
    for layer in adapter.layers(loaded.model).values():
        layer.load_weights(
            {name: 0.2 * mx.random.normal(array.shape) for name, array in layer.tensors().items()}
        )
    meta = adapter.AdapterMeta(method=config, base=described, **about)
    adapter.save(loaded.model, folder, meta=meta)
    return folder


@pytest.fixture(scope="module")
def loras(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {
        name: make_lora(folders["llama"], root / name, fields, seed, seen=[f"{seed:016x}"], template="alpaca")
        for seed, (name, fields) in enumerate(LORAS.items())
    }


@pytest.fixture(scope="module")
def torch_base(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = model.load(folders["llama"])
    return write_transformers(loaded.model, loaded.config, tmp_path_factory.mktemp("torch") / "base")


def by_peft(base: Path, folders: list[Path], weights: list[float], **settings: Any) -> Any:
    """The model with PEFT's merge as its active adapter `merged`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    merged = PeftModel.from_pretrained(opened, folders[0], adapter_name="member0")
    for i, folder in enumerate(folders[1:], start=1):
        merged.load_adapter(folder, adapter_name=f"member{i}")
    names = [f"member{i}" for i in range(len(folders))]
    merged.add_weighted_adapter(names, weights, "merged", **settings)
    merged.set_adapter("merged")
    return merged.eval()


def torch_logits(network: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return network(torch.tensor(IDS.tolist())).logits.numpy()


def our_logits(base: Path, *folders: Path) -> np.ndarray:
    loaded = model.load(base)
    for folder in folders:
        adapter.load(loaded, folder)
    loaded.model.eval()
    return np.array(call_model(loaded.model, IDS))


def bound(expected: np.ndarray) -> float:
    return float(1e-5 + 1e-5 * np.abs(expected).max())


def written(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in adapter.read_tensors(folder).items()}


@pytest.fixture
def shared_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides drop the same entries: a mask that follows from the shape alone."""
    import torch

    def mask(shape: tuple[int, ...], density: float) -> np.ndarray:
        return (np.random.default_rng(sum(shape)).random(shape) < density).astype(np.float32)

    def keep(self: _Noise, shape: tuple[int, ...], density: float) -> mx.array:
        return mx.array(mask(shape, density))

    def bernoulli(probabilities: Any) -> Any:
        return torch.tensor(mask(tuple(probabilities.shape), float(probabilities.reshape(-1)[0])))

    monkeypatch.setattr(_Noise, "keep", keep)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@pytest.mark.usefixtures("shared_masks")
@pytest.mark.parametrize("how", COMBINATIONS)
def test_every_way_is_pefts(
    how: str, folders: dict[str, Path], loras: dict[str, Path], torch_base: Path, tmp_path: Path
) -> None:
    members, weights = [loras[name] for name in ("a", "b", "c")], [0.7, 0.9, -0.4]
    settings: dict[str, Any] = {} if how in ("linear", "cat", "svd") else {"density": 0.4}
    theirs = by_peft(torch_base, members, weights, combination_type=how, **settings)
    done = combine(members, weights, tmp_path / "m", method=how, **settings)
    expected = torch_logits(theirs)
    np.testing.assert_allclose(
        our_logits(folders["llama"], done.path), expected, atol=bound(expected), rtol=0
    )
    assert np.abs(expected - our_logits(folders["llama"])).max() > 1e-2
    theirs.save_pretrained(tmp_path / "p", selected_adapters=["merged"])
    peft_tensors = written(tmp_path / "p" / "merged")
    ours = written(done.path)
    assert set(ours) == set(peft_tensors)
    assert done.layers == len(ours) // 2
    for name in ours:
        if name.endswith("lora_A.weight"):  # an SVD leaves signs open, the product not
            b = name.replace("lora_A", "lora_B")
            update = peft_tensors[b] @ peft_tensors[name]
            np.testing.assert_allclose(ours[b] @ ours[name], update, atol=bound(update), rtol=0)
        if not how.endswith("svd"):
            np.testing.assert_allclose(ours[name], peft_tensors[name], atol=1e-6)


@pytest.mark.parametrize(("how", "rank"), [("cat", None), ("svd", None), ("svd", 3), ("svd", 9)])
def test_different_ranks(
    how: str,
    rank: int | None,
    folders: dict[str, Path],
    loras: dict[str, Path],
    torch_base: Path,
    tmp_path: Path,
) -> None:
    members, weights = [loras["a"], loras["small"]], [1.0, 0.5]
    theirs = by_peft(torch_base, members, weights, combination_type=how, svd_rank=rank)
    done = combine(members, weights, tmp_path / "m", method=how, rank=rank)
    assert done.rank == (6 if how == "cat" else rank or 4)
    expected = torch_logits(theirs)
    np.testing.assert_allclose(
        our_logits(folders["llama"], done.path), expected, atol=bound(expected), rtol=0
    )


def test_pytorch_opens_the_result(
    loras: dict[str, Path], torch_base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = combine([loras["a"], loras["b"]], [0.5, 0.5], tmp_path / "m", method="cat")
    opened = AutoModelForCausalLM.from_pretrained(torch_base, attn_implementation="eager")
    expected = torch_logits(PeftModel.from_pretrained(opened, done.path).eval())
    np.testing.assert_allclose(
        our_logits(folders["llama"], done.path), expected, atol=bound(expected), rtol=0
    )


def test_rslora_has_its_scale(loras: dict[str, Path], tmp_path: Path) -> None:
    """The result is a plain LoRA of scale 1 whose update is the weighted one."""
    for how in ("linear", "cat", "svd"):
        done = combine([loras["rs"]], [0.5], tmp_path / how, method=how)
        assert "use_rslora" not in json.loads((done.path / "adapter_config.json").read_text())
        before, after = written(loras["rs"]), written(done.path)
        for name in (name for name in before if "lora_A" in name):
            b = name.replace("lora_A", "lora_B")
            expected = 0.5 * 5.0 / 2.0 * before[b] @ before[name]
            np.testing.assert_allclose(after[b] @ after[name], expected, atol=1e-6)


def test_conv1d_keeps_its_flag(folders: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2's layers are transposed in PyTorch: it must be told, or the adapter does not fit."""
    members = [make_lora(folders["gpt2"], tmp_path / str(i), {"rank": 2}, i) for i in range(2)]
    loaded = model.load(folders["gpt2"])
    base = write_transformers(loaded.model, loaded.config, tmp_path / "base")
    for how in ("linear", "svd"):
        theirs = by_peft(base, members, [0.6, 0.4], combination_type=how)
        done = combine(members, [0.6, 0.4], tmp_path / how, method=how)
        expected = torch_logits(theirs)
        np.testing.assert_allclose(
            our_logits(folders["gpt2"], done.path), expected, atol=bound(expected), rtol=0
        )
        assert json.loads((done.path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_trimming_keeps_the_largest() -> None:
    tensor = mx.array([[1.0, -5.0, 0.5], [3.0, -2.0, 4.0]])
    for density, kept in ((0.1, []), (0.5, [-5.0, 3.0, 4.0]), (0.9, [1.0, -5.0, 3.0, -2.0, 4.0])):
        left = np.array(_largest(tensor, density))
        assert left[left != 0].tolist() == kept
        assert all(value in (0, before) for value, before in zip(left.ravel(), np.array(tensor).ravel()))


def test_random_dropping_keeps_the_expectation_and_follows_the_seed() -> None:
    kept = _Noise(3).keep((200, 200), 0.3)
    assert set(np.unique(np.array(kept))) == {0.0, 1.0}
    assert abs(kept.mean().item() - 0.3) < 0.01
    noise = _Noise(3)
    assert mx.array_equal(noise.keep((200, 200), 0.3), kept)
    assert not mx.array_equal(noise.keep((200, 200), 0.3), kept)


def test_the_seed_decides(loras: dict[str, Path], tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, np.ndarray]:
        folders = [loras["a"], loras["c"]]
        return written(combine(folders, [0.5, 0.5], tmp_path / name, method="dare_ties", seed=seed).path)

    one, same, other = run("one", 1), run("same", 1), run("other", 2)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)


def test_what_is_known_of_the_members_is_kept(loras: dict[str, Path], tmp_path: Path) -> None:
    done = combine([loras["a"], loras["c"]], [1.0, 2.0], tmp_path / "m")
    meta = adapter.read_meta(done.path)
    assert meta.seen == [f"{0:016x}", f"{2:016x}"]
    assert meta.template == "alpaca"
    assert meta.base["model_type"] == "llama"
    assert meta.training == {
        "combined": [str(loras["a"]), str(loras["c"])],
        "weights": [1.0, 2.0],
        "how": "linear",
    }
    assert (meta.method.rank, meta.method.alpha) == (4, 4.0)


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "weights", "settings", "said"),
    [
        ("a,c", [1.0], {}, "1 weight for 2 adapters"),
        ("a,c", [1.0, float("nan")], {}, "nan"),
        ("a,c", [1.0, 1.0], {"method": "tise"}, "Did you mean 'ties'"),
        ("a,small", [1.0, 1.0], {}, "4, 2: use cat or svd"),
        ("a,c", [1.0, 1.0], {"rank": 3}, "svd only"),
        ("a,c", [1.0, 1.0], {"method": "svd", "rank": 0}, "rank=0"),
        ("a,c", [1.0, 1.0], {"method": "ties", "density": 0.0}, "density=0.0"),
        ("", [], {}, "no adapter"),
    ],
)
def test_settings_that_do_not_fit(
    names: str,
    weights: list[float],
    settings: dict[str, Any],
    said: str,
    loras: dict[str, Path],
    tmp_path: Path,
) -> None:
    folders = [loras[name] for name in names.split(",") if name]
    with pytest.raises(ConfigError, match=said):
        combine(folders, weights, tmp_path / "m", **settings)
    assert not (tmp_path / "m").exists()


def test_adapters_that_do_not_fit(folders: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    foreign = make_lora(folders["gpt2"], tmp_path / "foreign", {"rank": 4}, 1)
    with pytest.raises(AdapterError, match="model_type gpt2"):
        combine([loras["a"], foreign], [1.0, 1.0], tmp_path / "m")
    with pytest.raises(OutputError, match="exists and is not empty"):
        combine([loras["a"]], [1.0], foreign)
    with pytest.raises(AdapterError, match="not an adapter folder"):
        combine([tmp_path / "nothing"], [1.0], tmp_path / "m")
    broken = make_lora(folders["llama"], tmp_path / "broken", {"rank": 4}, 1)
    config = json.loads((broken / "mlx_adapters.json").read_text())
    config["config"]["rank"] = 5
    (broken / "mlx_adapters.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"r is 4, but by mlx_adapters\.json it is 5"):
        combine([loras["a"], broken], [1.0, 1.0], tmp_path / "m", method="cat")


# Command line ----------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["combine", *map(str, arguments)])


def test_the_command(loras: dict[str, Path], tmp_path: Path) -> None:
    result = run(
        loras["a"], loras["c"], tmp_path / "m", "--weights", "0.7,0.3", "--how", "ties", "--density", 0.3
    )
    assert result.exit_code == 0, result.output
    assert "ties" in result.stdout
    assert "rank 4" in result.stdout
    other = combine([loras["a"], loras["c"]], [0.7, 0.3], tmp_path / "o", method="ties", density=0.3)
    ours, theirs = written(tmp_path / "m"), written(other.path)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_weights_are_equal_shares_by_default(loras: dict[str, Path], tmp_path: Path) -> None:
    assert run(loras["a"], loras["c"], tmp_path / "m").exit_code == 0
    assert adapter.read_meta(tmp_path / "m").training["weights"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "0.7"], "1 weight for 2 adapters"),
        (["--weights", "0.7;0.3"], "numbers joined by commas"),
        (["--how", "tise"], "ties"),
        (["--rank", "3"], "svd only"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, loras: dict[str, Path], tmp_path: Path
) -> None:
    result = run(loras["a"], loras["c"], tmp_path / "m", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_write_that_fails_leaves_no_half_folder(
    loras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration was there before the weights: a folder that looks like an adapter and is none."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[write] Unable to write 12 bytes to file")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(
        OutputError,
        match=rf"^{re.escape(str(tmp_path / 'new'))}/adapter_model.safetensors: cannot be written",
    ):
        combine([loras["a"], loras["a"]], [0.5, 0.5], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
