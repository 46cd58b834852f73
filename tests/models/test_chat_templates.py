"""Chat prompts: the ids are transformers' for templates of many kinds, and every command asks with them."""

from pathlib import Path
from typing import Any

import pytest
from spoken import ROLES, TEMPLATES, make_speaker
from tiny import make_tiny
from transformers import AutoTokenizer

from mlx_adapters.data.sources import Rows
from mlx_adapters.data.templates import chosen_template, conversation, prompt_for
from mlx_adapters.data.tokens import encode, prompt_ids
from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.models.load import read_tokenizer

ASKED = [{"role": "user", "content": "tom has 3 apples"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "he has 3 ."}, {"role": "user", "content": "how many ?"}]
SYSTEM = [{"role": "system", "content": "be short"}, *ASKED]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speakers")
    return {name: make_speaker(name, root / name) for name in TEMPLATES}


def theirs(folder: Path, turns: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=False, **kwargs
    )
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_of_a_prompt_are_those_of_transformers(name: str, speakers: dict[str, Path]) -> None:
    """One question, several turns, and a system message, asked and trained on."""
    folder = speakers[name]
    tokenizer = read_tokenizer(folder, {})
    asked = prompt_for(ASKED[0]["content"], template="chat", tokenizer=tokenizer, phase="eval")
    assert prompt_ids(asked, tokenizer) == theirs(folder, ASKED)
    for turns in (ASKED, ANSWERED, SYSTEM):
        row = {"messages": [*turns, {"role": "assistant", "content": "3"}]}
        if turns is SYSTEM and "system" not in ROLES[name]:
            with pytest.raises(DataError, match="refuses these messages"):
                encode(Rows([row], "messages", "here"), tokenizer, template="chat")
            continue
        right = theirs(folder, turns)
        assert prompt_ids(conversation(turns, template="chat", tokenizer=tokenizer), tokenizer) == right
        (example,) = encode(
            Rows([row], "messages", "here"), tokenizer, template="chat", loss_on="last"
        ).examples
        assert example.ids[: example.loss_start] == right


@pytest.mark.parametrize("name", ["thinks unless told", "thinks when told"])
def test_thinking_is_as_the_template_has_it_unless_the_user_says(
    name: str, speakers: dict[str, Path]
) -> None:
    folder = speakers[name]
    tokenizer = read_tokenizer(folder, {})
    assert tokenizer.has_thinking, "mlx-lm's wrapper would set it"
    prompts = set()
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        right = theirs(folder, ASKED, **kwargs)
        asked = conversation(ASKED, template="chat", tokenizer=tokenizer, kwargs=kwargs)
        assert prompt_ids(asked, tokenizer) == right
        row = {"messages": [*ASKED, {"role": "assistant", "content": "3"}], "chat_template_kwargs": kwargs}
        (example,) = encode(Rows([row], "messages", "here"), tokenizer, template="chat").examples
        if tokenizer.decode(right).endswith("<think>\n"):  # the answer has no reasoning: nothing opens it
            right = right[: right.index(tokenizer.convert_tokens_to_ids("<think>"))]
        assert example.ids[: example.loss_start] == right
        prompts.add(tuple(right))
    assert len(prompts) == 2


def test_tools_and_the_system_of_a_row_reach_the_template(speakers: dict[str, Path]) -> None:
    folder = speakers["Qwen2.5"]
    tokenizer = read_tokenizer(folder, {})
    row = {"messages": [*ASKED, {"role": "assistant", "content": "3"}], "tools": [TOOL], "system": "be short"}
    (example,) = encode(Rows([row], "messages", "here"), tokenizer, template="chat").examples
    assert example.ids[: example.loss_start] == theirs(folder, SYSTEM, tools=[TOOL])


def test_a_variable_that_changes_nothing_is_refused(speakers: dict[str, Path]) -> None:
    tokenizer = read_tokenizer(speakers["SmolLM2"], {})
    for kwargs, words in (
        ({"tools": [TOOL]}, "does not read 'tools'"),
        ({"enable_thinking": False}, "does not read 'enable_thinking'"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is not the template's"),
    ):
        with pytest.raises(DataError, match=words):
            conversation(ASKED, template="chat", tokenizer=tokenizer, kwargs=kwargs)
    with pytest.raises(ConfigError, match=r"enable_thinking.*template chat, not by alpaca"):
        conversation(ASKED, template="alpaca", tokenizer=tokenizer, kwargs={"enable_thinking": True})


def test_what_an_answer_has_beside_its_text_is_learned_where_the_template_writes_it(
    speakers: dict[str, Path],
) -> None:
    tokenizer = read_tokenizer(speakers["thinks unless told"], {})

    def learned(**more: Any) -> str:
        row = {"messages": [*ASKED, {"role": "assistant", "content": "3", **more}]}
        (example,) = encode(Rows([row], "messages", "here"), tokenizer, template="chat").examples
        return str(tokenizer.decode(example.ids[example.loss_start :]))

    assert learned(id=7, reasoning_content="") == learned() == "3<|im_end|>\n"
    assert learned(reasoning_content="he has 3") == "<think>\nhe has 3\n</think>\n\n3<|im_end|>\n"


@pytest.mark.parametrize("name", ["GLM-4", "TinyLlama", None])
def test_generate_chat_and_serve_ask_the_same(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a chat template the ids are transformers'; a base without one is asked the plain text by all."""
    from typer.testing import CliRunner

    from mlx_adapters.cli.app import app
    from mlx_adapters.generate import conversation, text
    from mlx_adapters.models import load as models
    from mlx_adapters.serve import engine as serving
    from mlx_adapters.serve.requests import parse

    folder = make_tiny("llama", tmp_path, vocab_size=400)
    if name is not None:
        make_speaker(name, folder)
    asked: list[list[int]] = []

    def stream(*_: Any, prompt: list[int], **__: Any) -> Any:
        from mlx_adapters.generate.stream import Delta

        asked.append(prompt)
        yield Delta("", 1, "stop")

    for module in (text, conversation, serving):
        monkeypatch.setattr(module, "stream_tokens", stream)
    done = CliRunner().invoke(app, ["generate", str(folder), "--prompt", ASKED[0]["content"]])
    assert done.exit_code == 0, done.output
    loaded = models.load(folder)
    chat = conversation.Conversation(loaded, max_tokens=4)
    chat.turns = list(ASKED)
    list(chat.answer())
    engine = serving.Engine(loaded, {}, name="base")
    body = b'{"model": "base", "messages": [{"role": "user", "content": "tom has 3 apples"}]}'
    ask = parse(body, chat=True, max_tokens=9)
    job = engine.submit(ask)
    engine._take()
    engine._turn(engine._streams.popleft())
    assert job.deltas.get().reason == "stop"
    assert name is None or asked[0] == theirs(folder, ASKED)
    assert asked == [asked[0]] * 3
    tokenizer = loaded.tokenizer
    assert chosen_template(tokenizer=tokenizer) == ("plain" if name is None else "chat")
    if name is None:
        assert asked[0] == tokenizer.encode(ASKED[0]["content"])


def test_the_template_is_the_users_then_the_adapters_then_the_models() -> None:
    class Tokenizer:
        has_chat_template = True

    assert chosen_template("plain", "alpaca", tokenizer=Tokenizer()) == "plain"
    assert chosen_template(None, "alpaca", tokenizer=Tokenizer()) == "alpaca"
    assert chosen_template(None, "", tokenizer=Tokenizer()) == "chat"
    assert chosen_template(None, "") == "alpaca", "test sets are asked as the paper does"
