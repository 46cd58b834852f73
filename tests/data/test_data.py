"""Data: templates to the byte, tokens and their boundary, batches, files that are wrong, overlap."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tokenizer

from mlx_adapters.data.batches import batches
from mlx_adapters.data.long_rows import Fitted, fitted
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.templates import TEMPLATES, default_template, prompt_for, render
from mlx_adapters.data.tokens import Example, encode, prompt_ids
from mlx_adapters.errors import ConfigError, DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
S16 = " " * 16
HEAD = "Below is an instruction that describes a task"
PAIRED = HEAD + ", paired with an input that provides further context"
WRITE = ". Write a response that appropriately completes the request."

PROMPTS = {
    ("alpaca", "train", ""): f"{HEAD}{WRITE}\n\n### Instruction:\nAdd.\n\n### Response:\n",
    ("alpaca", "train", "3 4"): f"{PAIRED}{WRITE}\n\n### Instruction:\nAdd.\n\n### Input:\n3 4\n\n"
    "### Response:\n",
    ("llm-adapters", "train", ""): f"{HEAD}{WRITE}  \n\n{S16}### Instruction:\n{S16}Add.\n{S16}\n"
    f"{S16}### Response:\n{S16}",
    ("llm-adapters", "train", "3 4"): f"{PAIRED}{WRITE} \n\n{S16}### Instruction:\n{S16}Add.\n{S16}\n"
    f"{S16}### Input:\n{S16}3 4\n{S16}\n{S16}### Response:\n{S16}",
    ("llm-adapters", "eval", ""): f"{HEAD}{WRITE} \n\n{S16}### Instruction:\n{S16}Add.\n\n"
    f"{S16}### Response:\n{S16}",
    ("llm-adapters", "eval", "3 4"): f"{PAIRED}{WRITE}\n\n{S16}### Instruction:\n{S16}Add.\n\n"
    f"{S16}### Input:\n{S16}3 4\n\n{S16}### Response:\n{S16}",
    ("plain", "train", ""): "Add.",
    ("plain", "train", "3 4"): "Add.\n\n3 4",
}
PROMPTS |= {
    (name, "eval", input): text for (name, _, input), text in PROMPTS.items() if name != "llm-adapters"
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer, with a chat template."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = (
        "<s>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    file.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return _wrapped(folder)


@pytest.fixture(scope="module")
def with_start(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Any:
    """The same, but it writes <s> before and </s> behind every text, as some checkpoints do."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    inner = AutoTokenizer.from_pretrained(folder)
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    path = tmp_path_factory.mktemp("start")
    inner.save_pretrained(path)
    return _wrapped(path)


def _wrapped(folder: Path) -> Any:
    from mlx_lm.tokenizer_utils import load

    return load(folder)


def _rows(*rows: dict[str, Any], fmt: str = "completion") -> Rows:
    return Rows(list(rows), fmt, "here")


@pytest.mark.parametrize(("template", "phase", "input"), PROMPTS)
def test_prompt_is_exact(template: str, phase: Any, input: str) -> None:
    text = prompt_for("Add.", input, template=template, tokenizer=None, phase=phase)
    assert text == PROMPTS[template, phase, input]


def test_chat_uses_the_tokenizers_template(tokenizer: Any) -> None:
    assert prompt_for("add", "3", template="chat", tokenizer=tokenizer) == "<s>user add\n\n3 </s> assistant "
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    (example,) = encode(_rows({"messages": turns}, fmt="messages"), tokenizer, template="chat").examples
    start = example.loss_start
    assert tokenizer.decode(example.ids[:start]) == "<s> <unk> <unk> </s> <unk> <unk> </s> <unk>"
    assert tokenizer.decode(example.ids[start:]) == "a </s>"


def test_render_of_each_format() -> None:
    row = {"instruction": "Add.", "input": None, "output": "7"}
    prompt, completion = render(row, "instruction", template="alpaca", tokenizer=None)
    assert (prompt, completion) == (PROMPTS["alpaca", "train", ""], "7")
    pair = render({"prompt": "p", "completion": "c"}, "completion", template="plain", tokenizer=None)
    assert pair == ("p", "c")
    assert render({"text": "t"}, "text", template="plain", tokenizer=None) == ("", "t")


def test_the_template_of_a_model_that_has_one_is_the_default(tokenizer: Any, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    forms = ("instruction", "completion", "messages", "text")
    chosen = [[default_template(form, each) for form in forms] for each in (tokenizer, _wrapped(tmp_path))]
    assert chosen == [["chat", "chat", "chat", "plain"], ["alpaca", "plain", "chat", "plain"]]
    assert {*chosen[0], *chosen[1]} <= set(TEMPLATES)


def test_template_that_cannot_be_used(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="alpaca"):
        prompt_for("Add.", template="alpaka", tokenizer=tokenizer)
    make_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_for("Add.", template="chat", tokenizer=_wrapped(tmp_path))
    user = {"role": "user", "content": "a"}
    with pytest.raises(DataError, match=r"row 0: .*--template chat"):
        encode(_rows({"messages": [user, user]}, fmt="messages"), tokenizer, template="alpaca")
    with pytest.raises(DataError, match=r"row 0: .*the role must be 'assistant'"):
        encode(_rows({"messages": [user, user]}, fmt="messages"), tokenizer, template="chat")
    turns = [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"row 0: .*no tools"):
        encode(_rows({"messages": turns}, fmt="messages"), tokenizer, template="chat")


ROW = {"prompt": "tom has 3 apples", "completion": "the answer is 3"}


def test_boundary_and_end_token(tokenizer: Any) -> None:
    done = encode(_rows(ROW), tokenizer, template="plain")
    words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in " ".join(ROW.values()).split()]
    assert done.examples == [Example([*words, 2], 4)]
    assert (done.truncated, done.dropped) == (0, 0)
    assert encode(_rows(ROW), tokenizer, template="plain", loss_on="all").examples[0].loss_start == 1
    with pytest.raises(ConfigError, match="loss-on"):
        encode(_rows(ROW), tokenizer, template="plain", loss_on="both")


def _cut(rows: Rows, tokenizer: Any, length: int, **settings: Any) -> Fitted:
    whole = encode(rows, tokenizer, template="plain", **settings)
    return fitted(whole, length, "cut", form=rows.format, origin=rows.origin, tokenizer=tokenizer)


@pytest.mark.parametrize("length", range(5, 11))
def test_end_token_unless_truncated(tokenizer: Any, length: int) -> None:
    done = _cut(_rows(ROW), tokenizer, length)
    (example,) = done.examples
    assert len(example.ids) == min(length, 9)
    assert (example.ids[-1] == 2) == (done.truncated == 0) == (length >= 9)


def test_rows_without_a_target_are_dropped(tokenizer: Any) -> None:
    short = {"prompt": "a", "completion": "b"}
    done = _cut(_rows(ROW, short), tokenizer, 4)
    assert (len(done.examples), done.truncated, done.dropped) == (1, 1, 1)
    assert _cut(_rows(ROW), tokenizer, 4, loss_on="all").dropped == 0
    with pytest.raises(DataError, match=r"here: .*4 tokens.*--max-length"):
        _cut(_rows(ROW), tokenizer, 4)


def test_start_token_once(with_start: Any) -> None:
    turn = {"role": "user", "content": "a"}
    rows = [
        (_rows(ROW), "plain"),
        (_rows({"text": "tom has 3"}, fmt="text"), "plain"),
        (_rows({"text": "<s> tom has 3 </s>"}, fmt="text"), "plain"),
        (_rows({"messages": [turn, {"role": "assistant", "content": "b"}]}, fmt="messages"), "chat"),
        (_rows({"instruction": "a", "output": "b"}, fmt="instruction"), "alpaca"),
    ]
    for row, template in rows:
        ids = encode(row, with_start, template=template).examples[0].ids
        assert [i for i, token in enumerate(ids) if token == 1] == [0], template
        assert ids[-1] == 2, template
        assert ids[-2] != 2, template


def test_generation_starts_from_the_trained_prompt(tokenizer: Any, with_start: Any) -> None:
    for each in (tokenizer, with_start):
        (example,) = encode(_rows(ROW), each, template="plain").examples
        assert prompt_ids(ROW["prompt"], each) == example.ids[: example.loss_start]


EXAMPLES = st.lists(
    st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), max_size=60
)


@given(
    EXAMPLES, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.booleans(), st.sampled_from([1, 8])
)
def test_batches_hold_every_example_once(
    sizes: list[tuple[int, int]], size: int, seed: int, epoch: int, shuffle: bool, multiple: int
) -> None:
    examples = [Example([100 + row] * n, start) for row, (n, start) in enumerate(sizes)]
    made = batches(
        examples, batch_size=size, pad_id=0, seed=seed, epoch=epoch, shuffle=shuffle, multiple=multiple
    )
    held: Counter[int] = Counter()
    for batch in made:
        assert len(batch.ids) <= size
        assert (batch.ids.shape[1] - 1) % multiple == 0
        assert batch.ids.dtype == mx.int32
        assert batch.label_mask.dtype == np.float32
        assert batch.tokens == (batch.ids != 0).sum().item()
        assert batch.supervised == batch.label_mask.sum() == batch.weights.sum().item()
        for ids, mask in zip(np.array(batch.ids), batch.label_mask, strict=True):
            n, start = sizes[ids[0] - 100]
            held[int(ids[0])] += 1
            assert (ids[:n] == ids[0]).all()
            assert (ids[n:] == 0).all()
            assert np.flatnonzero(mask).tolist() == list(range(start, n))
    assert held == Counter(range(100, 100 + len(sizes)))
    assert len(made) <= -(-len(sizes) // size)


def _order(examples: list[Example], seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    made = batches(examples, batch_size=4, pad_id=0, seed=seed, epoch=epoch, shuffle=shuffle)
    return [batch.ids[:, 0].tolist() for batch in made]


def test_order_is_that_of_seed_and_epoch() -> None:
    examples = [Example([row + 1] * (2 + row % 7), 1) for row in range(200)]
    assert _order(examples, 1, 2) == _order(examples, 1, 2)
    assert len({str(_order(examples, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert _order(examples, 1, 2, shuffle=False) == _order(examples, 5, 0, shuffle=False)


def test_similar_lengths_share_a_batch() -> None:
    rng = np.random.default_rng(0)
    examples = [Example([1] * int(n), 1) for n in rng.integers(2, 200, 400)]
    made = batches(examples, batch_size=8, pad_id=0)
    assert sum(batch.tokens for batch in made) > 0.9 * sum(batch.ids.size for batch in made)
