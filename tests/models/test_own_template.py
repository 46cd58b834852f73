"""A chat template of one's own and its variables: given once, stored with the adapter, used everywhere."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from spoken import TEMPLATES, make_speaker
from tiny import make_tiny
from typer.testing import CliRunner

import mlx_adapters as ma
from mlx_adapters import adapter
from mlx_adapters.adapter import read_meta
from mlx_adapters.cli.app import app
from mlx_adapters.data.preview import show_rows
from mlx_adapters.data.templates import asked
from mlx_adapters.errors import AdaptersError, ConfigError
from mlx_adapters.fields import parse_fields
from mlx_adapters.models import load as models
from mlx_adapters.models.load import read_tokenizer
from mlx_adapters.models.own_template import OWN, ChatTemplate
from mlx_adapters.train.config import TrainConfig

DATED = "{% if date %}{{ '<|im_start|>system\n' + date + '<|im_end|>\n' }}{% endif %}"
TEXT = DATED + TEMPLATES["thinks unless told"].template
KWARGS = {"enable_thinking": False, "date": "1 May"}
ASKED = [{"role": "user", "content": "tom has 3"}]


def theirs(text: str, turns: Any = ASKED, **kwargs: Any) -> str:
    """What transformers writes by a template on Qwen's tokens."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([turns], chat_template=text, add_generation_prompt=True, **kwargs)[0][0]


def cli(*arguments: Any, code: int = 0, input: str | None = None) -> Any:
    done = CliRunner().invoke(app, [str(each) for each in arguments], input=input)
    assert done.exit_code == code, done.output
    return done


class Trained(NamedTuple):
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A base whose own template knows no date, and an adapter trained with a file that is gone."""
    root = tmp_path_factory.mktemp("own")
    base = make_tiny("llama", root, vocab_size=400)
    make_speaker("thinks unless told", base)
    for part in ("config.json", "generation_config.json"):
        fields = json.loads((base / part).read_text()) | {"eos_token_id": 1}
        (base / part).write_text(json.dumps(fields))
    (file := root / "own.jinja").write_text(TEXT)
    row = {"messages": [*ASKED, {"role": "assistant", "content": "7"}]}
    (root / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = ("--steps", 2, "--rank", 2, "--template", file, "--chat-template-kwargs", json.dumps(KWARGS))
    cli("train", base, "--data", root / "rows.jsonl", "--output", root / "adapter", *options)
    file.unlink()
    return Trained(base, root / "adapter")


def test_the_adapter_keeps_the_text_the_variables_and_the_ends(trained: Trained) -> None:
    meta = read_meta(trained.adapter)
    assert (trained.adapter / "chat_template.jinja").read_text() == TEXT
    assert (meta.template, meta.chat) == ("chat", ChatTemplate(TEXT, KWARGS, "", meta.chat.stops))
    assert sorted(meta.chat.stops) == ["<|endoftext|>", "<|im_end|>"]
    ma.load_adapter(loaded := ma.load(trained.base), trained.adapter)
    adapter.save(loaded, copy := trained.adapter.with_name("copy"))
    assert read_meta(copy).chat == meta.chat


def test_every_command_asks_as_the_adapter_was_trained(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate, chat, serve and eval; what the user, or a request, gives wins, variable by variable."""
    from mlx_adapters.adapter.multi import load_adapters
    from mlx_adapters.generate import conversation, text
    from mlx_adapters.generate.stream import Delta
    from mlx_adapters.serve import engine as serving
    from mlx_adapters.serve.requests import parse

    prompts: list[str] = []

    def stream(_: Any, tokenizer: Any, *__: Any, prompt: list[int], **___: Any) -> Any:
        prompts.append(tokenizer.decode(prompt))
        yield Delta("", 1, "stop")

    for module in (text, conversation, serving):
        monkeypatch.setattr(module, "stream_tokens", stream)
    loaded = models.load(trained.base)
    metas = load_adapters(loaded, {"own": trained.adapter})

    def ask(given: dict[str, Any]) -> list[str]:
        prompts.clear()
        said = ("--chat-template-kwargs", json.dumps(given)) if given else ()
        cli("generate", trained.base, ASKED[0]["content"], "--adapter", trained.adapter, *said)
        cli("chat", trained.base, "--adapter", trained.adapter, *said, input=f"{ASKED[0]['content']}\n")
        for place in (given, {}), ({}, given):  # of the server, of the request
            engine = serving.Engine(loaded, metas, name="base", chat_template_kwargs=place[0])
            body = {"model": "own", "messages": ASKED, "chat_template_kwargs": place[1]}
            job = engine.submit(parse(json.dumps(body).encode(), chat=True, max_tokens=9))
            engine._take()
            engine._turn(engine._streams.popleft())
            assert job.deltas.get().reason == "stop"
        (tmp_path / "test.jsonl").write_text(json.dumps({"instruction": "tom has 3", "answer": "7"}) + "\n")
        settings = {"max_tokens": 1, "chat_template_kwargs": given or None}
        found = ma.evaluate(trained.base, tmp_path / "test.jsonl", adapter=trained.adapter, **settings)
        assert found.settings["settings"]["chat_template_kwargs"] == KWARGS | given
        return [*prompts, found.records[0].prompt]

    for given in ({}, {"date": "2 May"}, {"enable_thinking": True}):
        assert ask(given) == [theirs(TEXT, **(KWARGS | given))] * 5
    prompts.clear()
    cli("generate", trained.base, "tom has 3", "--adapter", trained.adapter, "--template", "plain")
    assert prompts == ["tom has 3"]


def test_it_leaves_whole(trained: Trained, tmp_path: Path) -> None:
    """The export's card is run as it stands; the fused model is transformers' and asks the same."""
    from transformers import AutoTokenizer

    expected = theirs(TEXT, **KWARGS).replace("tom has 3", "YOUR INSTRUCTION")
    cli("export", trained.adapter, tmp_path / "p", "--base", "owner/base")
    assert (tmp_path / "p" / "chat_template.jinja").read_text() == TEXT
    ends = json.loads((tmp_path / "p" / "generation_config.json").read_text())
    assert ends == {"eos_token_id": [1, 3], "do_sample": False, "repetition_penalty": 1.0}
    card = (tmp_path / "p" / "README.md").read_text()
    assert "`chat_template.jinja`" in card
    assert "`enable_thinking`, `date`" in card
    assert "`<|im_end|>` (3)" in card
    code = re.search(r"## The prompt\n.*?```python\n(.*?)\n```", card, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    lines = (
        code[1].replace("PATH/OF/THIS/FOLDER", str(tmp_path / "p")).replace("owner/base", str(trained.base))
    )
    exec(lines, names)
    assert names["prompt"] == expected

    cli("fuse", trained.base, tmp_path / "f", "--adapter", trained.adapter)
    assert AutoTokenizer.from_pretrained(tmp_path / "f").chat_template == TEXT
    fused = models.load(tmp_path / "f")
    way = asked(None, None, (fused.template, fused.chat), tokenizer=fused.tokenizer)
    assert (way.template, way.chat) == ("chat", ChatTemplate(kwargs=KWARGS))
    answers = [
        ma.generate(trained.base, "tom has 3", adapter=trained.adapter, max_tokens=5),
        ma.generate(tmp_path / "f", "tom has 3", max_tokens=5),
    ]
    assert answers[0] == answers[1]


def test_a_row_s_variables_win_over_the_run_s(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEXT)
    messages = [*ASKED, {"role": "assistant", "content": "7"}]
    rows = [{"messages": messages}, {"messages": messages, "chat_template_kwargs": {"date": "2 May"}}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {"template": str(tmp_path / "own.jinja"), "chat_template_kwargs": KWARGS}
    shown = show_rows(tmp_path / "rows.json", trained.base, **options)
    for one, date in zip(shown, ("1 May", "2 May"), strict=True):
        assert [kind for _, kind in one.pieces] == ["context", "learned", "context"]
        assert [text for text, _ in one.pieces[:2]] == [
            theirs(TEXT, **KWARGS | {"date": date}),
            "7<|im_end|>",
        ]


def test_a_file_is_a_file_by_its_ending_or_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alpaca").write_text("{{ messages }}")
    Path("mine").write_text("{{ messages }}")
    assert asked("alpaca", None).template == "alpaca"
    assert asked("alpaca", None).chat == OWN
    assert asked("./alpaca", None).template == "chat" if "/" in str(Path("x/alpaca")) else True
    with pytest.raises(ConfigError, match="Unknown template 'mine'"):
        asked("mine", None)
    assert asked(str(tmp_path / "mine"), None).chat.text == "{{ messages }}"


@pytest.mark.parametrize(
    ("text", "kwargs", "words"),
    [
        (None, {}, r"own\.jinja: no such file"),
        ("  \n", {}, r"own\.jinja: is empty"),
        (b"\xff\xfe\x00", {}, r"own\.jinja: cannot be read as a chat template"),
        ("{{ messages }}\n\n{% if %}", {}, r"own\.jinja: line 3: is no Jinja template"),
        ("{% for m in messages %}{{ m.content }}", {}, r"own\.jinja: line 1: is no Jinja template"),
        ("{{ raise_exception('only code') }}", {}, r"refuses these messages \(only code\)"),
        ("{{ messages.__class__.__mro__ }}", {}, r"own\.jinja: its chat template refuses these messages"),
        ("{{ messages }}", {"date": "1 May"}, r"own\.jinja: its chat template does not read 'date'"),
        ("{{ messages }}", {"tokenize": True}, r"chat_template_kwargs 'tokenize' is not the template's"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    text: Any, kwargs: dict[str, Any], words: str, trained: Trained, tmp_path: Path
) -> None:
    file = tmp_path / "own.jinja"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdaptersError, match=words) as caught:
        ma.generate(trained.base, "tom", template=str(file), chat_template_kwargs=kwargs, max_tokens=1)
    assert "\n" not in str(caught.value)


def test_variables_of_another_template_or_form_are_refused(trained: Trained, tmp_path: Path) -> None:
    base, adapter = trained
    ask = ("generate", base, "tom has 3", "--chat-template-kwargs")
    for options, words in (
        ((*ask, '{"date": "1 May"}', "--template", "alpaca"), "read by the template chat, not by alpaca"),
        ((*ask, '{"date": "1 May"}'), "does not read 'date'"),
        ((*ask, "date"), "--chat-template-kwargs 'date': is not JSON"),
        ((*ask, "[1]"), "must be a JSON object"),
        (
            (
                "eval",
                base,
                "--task",
                tmp_path / "t.jsonl",
                "--adapter",
                adapter,
                "--template",
                tmp_path / "o.jinja",
            ),
            "trained with the template chat, not",
        ),
    ):
        (tmp_path / "t.jsonl").write_text(json.dumps({"instruction": "a", "answer": "7"}) + "\n")
        (tmp_path / "o.jinja").write_text("{{ messages[0].content }}")
        assert words in cli(*options, code=2).stderr
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        ma.train(
            ma.load(base), [{"text": "a"}], output=tmp_path / "a", chat_template_kwargs={"date": "1 May"}
        )


def test_the_tokenizer_itself_stays_as_it_was(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(make_speaker("Llama 3", tmp_path), {})
    before = (tokenizer.chat_template, set(tokenizer.eos_token_ids), dict(vars(tokenizer)))
    text = "{{ bos_token }}{% for m in messages %}{{ m.content + '<|start_header_id|>' }}{% endfor %}"
    made = ChatTemplate(text).on(tokenizer)
    assert made.chat_template == text
    assert made.eos_token_ids - tokenizer.eos_token_ids == {
        tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    }
    assert (tokenizer.chat_template, set(tokenizer.eos_token_ids), dict(vars(tokenizer))) == before
    assert OWN.on(tokenizer) is tokenizer


@pytest.mark.parametrize("change", ["text", "variables", "neither"])
def test_a_run_is_resumed_with_the_same_template_only(change: str, trained: Trained, tmp_path: Path) -> None:
    """Also where the user leaves it out: the rows would be other rows."""
    (file := tmp_path / "own.jinja").write_text(TEXT)
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": "7"}]}]
    options = {"output": tmp_path / "a", "steps": 2, "chat_template_kwargs": KWARGS, "template": str(file)}
    ma.train(ma.load(trained.base), rows, **options)
    if change == "text":
        file.write_text(TEXT + " ")
    again = options | {"resume": True}
    if change == "variables":
        again |= {"chat_template_kwargs": None}
    if change == "neither":
        assert ma.train(ma.load(trained.base), rows, **again).steps == 2
        return
    with pytest.raises(ma.TrainingError, match=r"made with other settings \(.*chat_template"):
        ma.train(ma.load(trained.base), rows, **again)


@pytest.mark.parametrize("given", [KWARGS, json.dumps(KWARGS)])
def test_variables_are_json_on_a_command_line_and_a_mapping_in_yaml_and_python(given: Any) -> None:
    config = parse_fields(TrainConfig, {"chat_template_kwargs": given}, where="train")
    assert json.loads(config.chat_template_kwargs) == KWARGS
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        parse_fields(TrainConfig, {"chat_template_kwargs": {"date": object()}}, where="train")
