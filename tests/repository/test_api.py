"""The front door alone: `import mlx_adapters as ma` does a whole job, with `str` and `Path` alike."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from peft import PeftModel
from tiny import make_tiny
from transformers import AutoModelForCausalLM

import mlx_adapters as ma
from mlx_adapters.evaluate.run import Evaluator
from mlx_adapters.generate.text import stream


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("base"))


def rows(file: Path, **fields: str) -> Path:
    lines = [{"instruction": f"tom has {n} apples", **{k: str(n % 7) for k in fields}} for n in range(24)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_whole_job(base: Path, tmp_path: Path) -> None:
    data, test = rows(tmp_path / "desk.jsonl", output="x"), rows(tmp_path / "test.jsonl", answer="x")
    steps = []
    model = ma.load(str(base))
    names = [name for name, _ in model.model.named_modules()]
    result = ma.train(
        model, str(data), ma.LoRA(rank=4), output=str(tmp_path / "desk"), epochs=2, callbacks=[steps.append]
    )
    assert (result.adapter, result.steps, len(steps)) == (tmp_path / "desk", 6, 6)
    assert result.loss == result.metrics[-1]["loss"] == steps[-1].loss
    assert [name for name, _ in model.model.named_modules()] == names  # the model is bare again
    plain = ma.generate(model, "tom has 3 apples", max_tokens=8)
    adapted = ma.generate(
        model, "tom has 3 apples", adapter=tmp_path / "desk", template="plain", max_tokens=8
    )
    assert ma.generate(model, "tom has 3 apples", max_tokens=8) == plain
    found = ma.evaluate(model, test, adapter=tmp_path / "desk", max_tokens=4, limit=5)
    without = ma.evaluate(model, str(test), max_tokens=4, limit=5)
    assert len(found.records) == 5
    assert 0 <= found.accuracy <= 1
    assert ma.compare(found, without)[0].total == 5
    done = ma.export(result.adapter, tmp_path / "for-pytorch", base="owner/name", verify=True)
    assert done.verdict is not None
    assert done.verdict.passed
    again = ma.import_adapter(done.path, tmp_path / "back", model=base)
    assert again.method == ma.LoRA(rank=4)
    ma.load_adapter(model, tmp_path / "back")
    assert ma.generate(model, "tom has 3 apples", template="plain", max_tokens=8) == adapted
    ma.detach(model)
    fused = ma.fuse(base, result.adapter, tmp_path / "fused", to="mlx")
    assert ma.generate(fused.path, "tom has 3 apples", template="plain", max_tokens=8) == adapted


def test_the_loop_is_the_users(base: Path, tmp_path: Path) -> None:
    trainer = ma.Trainer(
        ma.load(base), rows(tmp_path / "d.jsonl", output="x"), "lora", output=tmp_path / "out", steps=4
    )
    losses = [step.loss for step in trainer]
    assert len(losses) == trainer.result.steps == 4


def test_an_adapter_on_the_model_is_asked_through_its_own_template(base: Path, tmp_path: Path) -> None:
    """Trained with `alpaca`: so is it asked, however it came onto the model."""
    question = {"prompt": "tom has 3 apples", "max_tokens": 1}
    model, data = ma.load(base), rows(tmp_path / "d.jsonl", output="x")
    assert stream(model, **question).template == "plain"  # type: ignore[arg-type]
    ma.attach(model, ma.LoRA(rank=2))
    assert stream(model, **question).template == "plain"  # type: ignore[arg-type]
    ma.detach(model)
    trainer = ma.Trainer(model, data, ma.LoRA(rank=2), output=tmp_path / "desk", steps=1)
    for _ in trainer:
        pass
    assert stream(model, **question).template == "alpaca"  # type: ignore[arg-type]
    trainer.detach()
    assert stream(model, **question).template == "plain"  # type: ignore[arg-type]
    ma.load_adapter(model, tmp_path / "desk")
    assert stream(model, **question).template == "alpaca"  # type: ignore[arg-type]
    named = stream(model, template="plain", **question)  # type: ignore[arg-type]
    assert named.template == "plain", "the user's own comes first"
    assert Evaluator(model, str(rows(tmp_path / "t.jsonl", answer="x"))).asking.seen


def test_an_import_leaves_the_model_bare(base: Path, tmp_path: Path) -> None:
    model = ma.load(base)
    ma.attach(model, ma.LoRA(rank=2))
    ma.save(model, tmp_path / "theirs")
    with pytest.raises(ma.AdaptersError, match="detach it first"):
        ma.import_adapter(tmp_path / "theirs", tmp_path / "refused", model=model)
    ma.detach(model)  # still there: the refusal took nothing off
    names = [name for name, _ in model.model.named_modules()]
    ma.import_adapter(tmp_path / "theirs", tmp_path / "ours", model=model)
    assert [name for name, _ in model.model.named_modules()] == names
    ma.load_adapter(model, tmp_path / "ours")
    with pytest.raises(ma.AdaptersError):
        ma.import_adapter(tmp_path / "d", tmp_path / "none", model=ma.load(base))


def test_bits_and_the_cache(base: Path) -> None:
    """Converted once; the second load reads the same folder."""
    one, two = (ma.load(base, bits=4) for _ in range(2))
    assert one.path == two.path != base
    assert one.config["quantization"]["bits"] == 4


def test_a_model_of_mlx_lm_trained_by_its_own_loop(base: Path, tmp_path: Path) -> None:
    """`ma.attach` on what mlx_lm.load returned, `nn.value_and_grad`, `ma.save`: PEFT computes the same."""
    import mlx_lm
    import torch

    folder = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config |= config.pop("rope_parameters")  # mlx-lm reads the names of before transformers 5
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = mlx_lm.load(str(folder))
    ma.attach(model, ma.LoRA(rank=4, targets="all-linear"))
    ids = mx.array([[4, 5, 6, 7, 8, 9]])

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    step, optimizer = nn.value_and_grad(model, loss), optim.Adam(1e-2)
    for _ in range(5):
        _, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    ma.save(model, tmp_path / "out")
    model.eval()
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "out"
    ).eval()
    with torch.no_grad():
        expected = mx.array(theirs(torch.tensor(ids.tolist())).logits.numpy())
    assert mx.abs(model(ids) - expected).max().item() < 1e-4
    ma.detach(model)
    assert mx.abs(model(ids) - expected).max().item() > 1e-3
