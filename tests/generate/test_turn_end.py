"""A base learns two-turn dialogues, and stops by itself where a turn ends: in every command and in torch."""

import http.client
import json
import random
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from spoken import TEMPLATES, make_speaker
from tiny import make_tiny
from typer.testing import CliRunner

from mlx_adapters.adapter.multi import load_named
from mlx_adapters.cli.app import app
from mlx_adapters.convert import peft
from mlx_adapters.serve import Engine
from mlx_adapters.serve.server import serving

ANSWERS = {"a": "tom", "b": "3", "c": "no", "d": "7 8", "e": "yes", "f": "go"}
LONGEST = 24
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# (a template, the token that closes its turns): the base's configuration names another, the end of a text
BASES = {"Qwen2.5": (CHATML, "<|im_end|>"), "Gemma": (TEMPLATES["Gemma"].template, "<end_of_turn>")}


class Trained(NamedTuple):
    """A base, its adapter, the export of that, and the token that closes a turn."""

    base: Path
    adapter: Path
    exported: Path
    end: int


def cli(*arguments: Any, input: str | None = None) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments], input=input)
    assert done.exit_code == 0, done.output
    return done.stdout


def question(name: str) -> dict[str, str]:
    return {"role": "user", "content": f"say {name}"}


def answer(name: str) -> dict[str, str]:
    return {"role": "assistant", "content": ANSWERS[name]}


@pytest.fixture(scope="module", params=BASES)
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained with a template of a file, which is gone afterwards."""
    name, root = request.param, tmp_path_factory.mktemp("turns")
    base = make_tiny("llama", root, vocab_size=400, hidden_size=64, intermediate_size=128)
    make_speaker(name, base)
    (base / "chat_template.jinja").unlink()
    (file := root / "own.jinja").write_text(BASES[name][0])
    tokens = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    end_of_text = ids[TEMPLATES[name].eos or TEMPLATES[name].special[0]]
    for part in ("config.json", "generation_config.json"):
        fields = json.loads((base / part).read_text()) | {"eos_token_id": end_of_text}
        if part == "generation_config.json":  # which transformers would go by
            fields |= {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5}
        (base / part).write_text(json.dumps(fields))
    rng = random.Random(0)
    pairs = [rng.choices([*ANSWERS], k=2) for _ in range(200)]
    rows = [{"messages": [turn(one) for one in pair for turn in (question, answer)]} for pair in pairs]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--steps", 60, "--lr", 1e-2, "--rank", 16, "--targets", "all-linear", "--template", file)
    options += ("--modules-to-save", "lm_head,embed_tokens")
    cli("train", base, "--data", root / "rows.jsonl", "--output", root / "adapter", *options)
    file.unlink()
    cli("export", root / "adapter", root / "exported", "--base", "owner/base")
    return Trained(base, root / "adapter", root / "exported", ids[BASES[name][1]])


def in_torch(
    model: Any, tokenizer: Any, turns: list[dict[str, str]], **settings: Any
) -> tuple[list[int], str]:
    """(the tokens, the text) of an answer, asked for as the export's card says."""
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    if tokenizer.bos_token is not None:
        assert inputs["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    tokens = model.generate(**inputs, **settings)
    ids = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


def served(base: Path, adapter: Path, conversations: list[list[dict[str, str]]]) -> list[Any]:
    """What `serve` answers over HTTP."""
    engine = Engine(*load_named(str(base), [f"desk={adapter}"], base="base"), name="base")
    found: list[Any] = []

    def ask(address: str) -> None:
        try:
            place = address.removeprefix("http://").partition("/")[0]
            for messages in conversations:
                link = http.client.HTTPConnection(place, timeout=60)
                body = {"model": "desk", "messages": messages, "max_tokens": LONGEST}
                link.request(
                    "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
                )
                found.append(json.loads(link.getresponse().read()))
                link.close()
        finally:
            engine.stop()

    with serving(engine, "127.0.0.1", 0, max_tokens=LONGEST) as address:
        client = threading.Thread(target=ask, args=(address,))
        client.start()
        engine.run()
        client.join()
    return found


def test_answers_stop_at_the_end_of_a_turn_in_every_command_and_in_torch(trained: Trained) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    names = ("a", "d")
    first, second = [question("a")], [question("a"), answer("a"), question("d")]
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    tokenizer.chat_template = (trained.exported / "chat_template.jinja").read_text()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(trained.base), trained.exported
    ).eval()
    ends = GenerationConfig.from_pretrained(trained.exported, max_new_tokens=LONGEST)
    theirs = [in_torch(model, tokenizer, turns, generation_config=ends) for turns in (first, second)]
    assert [text for _, text in theirs] == [ANSWERS[name] for name in names]
    assert all(ids[-1] == trained.end and ids.count(trained.end) == 1 for ids, _ in theirs)
    assert peft.verify(trained.exported, trained.base).answer_equal
    likeliest = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": LONGEST}
    runs_on, _ = in_torch(
        model, tokenizer, first, **likeliest
    )  # to the end that the base's configuration knows
    assert len(runs_on) == LONGEST
    assert runs_on[: len(theirs[0][0])] == theirs[0][0]

    options = (trained.base, "--adapter", trained.adapter, "--max-tokens", LONGEST)
    asked = json.loads(cli("generate", *options, "--prompt", first[0]["content"], "--json"))
    assert (asked["text"], asked["tokens"], asked["finish_reason"]) == (
        theirs[0][1],
        len(theirs[0][0]),
        "stop",
    )
    said = cli("chat", *options, input="".join(f"{question(name)['content']}\n" for name in names))
    assert said == "".join(f"{text}\n" for _, text in theirs)
    for (ids, text), found in zip(
        theirs, served(trained.base, trained.adapter, [first, second]), strict=True
    ):
        (choice,) = found["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert found["usage"]["completion_tokens"] == len(ids)
