"""What is learned of a conversation, by each kind of template."""

import re
from pathlib import Path

import pytest
from learned import TWO_TURNS, bracketed, encoded, labels
from spoken import TEMPLATES, make_speaker

from mlx_adapters.data.sources import Rows
from mlx_adapters.data.templates import prompt_for
from mlx_adapters.data.tokens import Example, encode, prompt_ids
from mlx_adapters.errors import DataError
from mlx_adapters.models.load import read_tokenizer

# Template -> its training texts of TWO_TURNS, the learned parts in brackets.
LEARNED = {
    "Qwen2.5": [
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\ntom has 3<|im_end|>\n<|im_start|>assistant"
        "\n[he has 3<|im_end|>]\n<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n[so<|im_end|>]\n"
    ],
    "thinks when told": [  # it writes more before an answer than in a conversation
        "<|im_start|>user\ntom has 3<|im_end|>\n<|im_start|>assistant\n</think>[he has 3<|im_end|>]\n",
        "<|im_start|>user\ntom has 3<|im_end|>\n<|im_start|>assistant\nhe has 3<|im_end|>\n<|im_start|>user"
        "\nhow?<|im_end|>\n<|im_start|>assistant\n</think>[so<|im_end|>]\n",
    ],
    "Llama 3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\ntom has 3<|eot_id|><|start_header_id|>"
        "assistant<|end_header_id|>\n\n[he has 3<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nhow?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[so<|eot_id|>]"
    ],
    "Phi-3": [  # what it writes once at the end is not learned
        # sentencepiece decodes a line end behind a special token with a space
        "<|user|> \ntom has 3<|end|> \n<|assistant|> \n[he has 3<|end|>]\n<|user|> \nhow?<|end|> \n"
        "<|assistant|> \n[so<|end|>]\n<|endoftext|>"
    ],
    "GLM-4": [  # the next turn's token ends an answer, also the last
        "[gMASK]<sop><|user|>\ntom has 3<|assistant|>[\nhe has 3<|user|>]\nhow?<|assistant|>[\nso<|user|>]"
    ],
    "DeepSeek": [
        "<|begin of sentence|>User: tom has 3\n\nAssistant:[ he has 3<|end of sentence|>]User: how?\n\n"
        "Assistant:[ so<|end of sentence|>]"
    ],
    "channels": [  # an earlier answer ends with another token: a row of its own
        "<|start|>user<|message|>tom has 3<|end|><|start|>assistant"
        "[<|channel|>final<|message|>he has 3<|return|>]",
        "<|start|>user<|message|>tom has 3<|end|><|start|>assistant<|channel|>final<|message|>he has 3<|end|>"
        "<|start|>user<|message|>how?<|end|><|start|>assistant[<|channel|>final<|message|>so<|return|>]",
    ],
}


@pytest.mark.parametrize("name", LEARNED)
def test_every_answer_is_learned_with_the_token_that_ends_its_turn(name: str, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(make_speaker(name, tmp_path), {})
    done = encoded(tokenizer, TWO_TURNS)
    assert [bracketed(example, tokenizer) for example in done.examples] == LEARNED[name]
    assert done.rewritten == len(LEARNED[name]) - 1
    (last,) = encoded(tokenizer, TWO_TURNS, loss_on="last").examples
    assert last.ids == done.examples[-1].ids
    assert sum(labels(last)) == last.supervised <= done.examples[-1].supervised
    (everything,) = encoded(tokenizer, TWO_TURNS, loss_on="all").examples
    assert everything == Example(last.ids, 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_and_its_answer_are_one_conversation_whatever_the_layout(
    name: str, tmp_path: Path
) -> None:
    tokenizer = read_tokenizer(make_speaker(name, tmp_path), {})
    expected = encoded(tokenizer, TWO_TURNS[:2]).examples
    rows = {
        "completion": {"prompt": "tom has 3", "completion": "he has 3"},
        "instruction": {"instruction": "tom has 3", "output": "he has 3"},
    }
    for fmt, row in rows.items():
        assert encode(Rows([row], fmt, "here"), tokenizer, template="chat").examples == expected
    assert expected[0].ids[-1] in tokenizer.eos_token_ids or labels(expected[0])[-1] is False


def test_answers_that_are_marked_are_not_learned(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(make_speaker("Qwen2.5", tmp_path), {})
    first = [{**TWO_TURNS[1], "weight": 0}]
    done = encoded(tokenizer, [TWO_TURNS[0], *first, *TWO_TURNS[2:]])
    assert bracketed(done.examples[0], tokenizer).count("[") == 1
    with pytest.raises(DataError, match="row 0: no message is an answer to learn"):
        encoded(tokenizer, [TWO_TURNS[0], *first])
    assert encoded(tokenizer, [*TWO_TURNS, TWO_TURNS[0]]).examples == encoded(tokenizer, TWO_TURNS).examples


def test_an_open_thought_does_not_swallow_an_answer(tmp_path: Path) -> None:
    """The template asks with `<think>`, and writes an answer without reasoning without it."""
    tokenizer = read_tokenizer(make_speaker("thinks when told", tmp_path), {})
    row = {"chat_template_kwargs": {"enable_thinking": True}}
    (example,) = encoded(tokenizer, TWO_TURNS[:2], row=row).examples
    assert bracketed(example, tokenizer).endswith("<|im_start|>assistant\n[he has 3<|im_end|>]\n")


def test_a_cut_conversation_keeps_the_answers_before_the_cut(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(make_speaker("Qwen2.5", tmp_path), {})
    (whole,) = encoded(tokenizer, TWO_TURNS).examples
    for length in range(whole.loss_start + 1, len(whole.ids)):
        cut = whole.cut(length)
        assert labels(cut) == labels(whole)[:length]
        assert cut.supervised == sum(labels(whole)[:length])


def test_a_system_message_that_stands_in_the_last_question_alone(tmp_path: Path) -> None:
    """Mistral-Nemo's template leaves it out of a conversation that ends with an answer, but asks with it."""
    folder = make_speaker("Mistral", tmp_path)
    written = (Path(__file__).parent / "chat_templates" / "mistral_nemo.jinja").read_text()
    (folder / "chat_template.jinja").write_text(written)
    tokenizer = read_tokenizer(folder, {})
    done = encoded(tokenizer, [{"role": "system", "content": "be kind"}, *TWO_TURNS])
    assert [bracketed(example, tokenizer) for example in done.examples] == [
        "<s> [INST]be kind\n\ntom has 3[/INST][he has 3</s>]",
        "<s> [INST]tom has 3[/INST]he has 3</s> [INST]be kind\n\nhow?[/INST][so</s>]",
    ]
    assert done.rewritten == 1


# Marks ----------------------------------------------------------------------------------------------------

_MARKED = (
    "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\\n' }}{%% if m.role == 'assistant' %%}%s"
    "{%% else %%}{{ m.content + '<|im_end|>' }}{%% endif %%}{{ '\\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
_ALL = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
_TEXT = "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
_PART = "{{ m.content[:3] }}{% generation %}{{ m.content[3:] + '<|im_end|>' }}{% endgeneration %}"
_LAST = f"{{% if loop.last %}}{_ALL}{{% else %}}{{{{ m.content + '<|im_end|>' }}}}{{% endif %}}"


@pytest.mark.parametrize(
    ("marks", "learned"),
    [
        (_ALL, ["he has 3<|im_end|>", "so<|im_end|>"]),
        (_TEXT, ["he has 3<|im_end|>", "so<|im_end|>"]),  # the end of a turn is learned with it
        (_PART, ["has 3<|im_end|>", "<|im_end|>"]),
        (_LAST, ["so<|im_end|>"]),
    ],
)
def test_what_a_template_marks_is_what_is_learned(marks: str, learned: list[str], tmp_path: Path) -> None:
    tokenizer = read_tokenizer(make_speaker("Qwen2.5", tmp_path), {})
    tokenizer.chat_template = _MARKED % marks
    (example,) = encoded(tokenizer, TWO_TURNS).examples
    assert re.findall(r"\[(.*?)\]", bracketed(example, tokenizer)) == learned
    theirs = tokenizer._tokenizer.apply_chat_template(
        TWO_TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.ids == theirs["input_ids"]
    if marks != _TEXT:
        assert labels(example) == [bool(each) for each in theirs["assistant_masks"]]


def test_a_template_that_marks_no_answer_is_refused(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(make_speaker("Qwen2.5", tmp_path), {})
    tokenizer.chat_template = _MARKED % "{{ m.content }}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"row 0: .*\{% generation %\} marks no part of the answers"):
        encoded(tokenizer, TWO_TURNS)


def test_reasoning_that_a_template_leaves_out_is_refused(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(make_speaker("Qwen2.5", tmp_path), {})
    for answer in ({"content": "so", "reasoning_content": "three"}, {"content": "so", "reasoning": "three"}):
        with pytest.raises(DataError, match=r"row 0: .*does not write the reasoning of an answer .'three'"):
            encoded(tokenizer, [TWO_TURNS[0], {"role": "assistant", **answer}])


def test_answers_end_where_a_template_closes_turns_by_ordinary_text(tmp_path: Path) -> None:
    """Each is a row of its own, for in a conversation no token would end it."""
    tokenizer = read_tokenizer(make_speaker("writes <s> itself", tmp_path), {})
    done = encoded(tokenizer, TWO_TURNS)
    assert [bracketed(example, tokenizer).rpartition("[")[2] for example in done.examples] == [
        " he has 3</s>]",
        " so</s>]",
    ]


# The first token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, spoken in TEMPLATES.items() if spoken.bos and spoken.front])
def test_a_text_begins_once(name: str, tmp_path: Path) -> None:
    """In training and in prompts, whether the template writes the first token or the tokenizer."""
    tokenizer = read_tokenizer(make_speaker(name, tmp_path), {})
    start = tokenizer.bos_token_id
    expected = 0 if name in ("TinyLlama", "Phi-3") else 1  # transformers adds none to what a template writes
    (example,) = encoded(tokenizer, TWO_TURNS[:2]).examples
    assert example.ids.count(start) == expected
    prompts = [
        prompt_for("tom has 3", template=template, tokenizer=tokenizer, phase="eval")
        for template in ("chat", "plain", "alpaca")
    ]
    counts = [prompt_ids(prompt, tokenizer).count(start) for prompt in prompts]
    assert counts == [expected, 1, 1]
    rows = {"text": {"text": "tom"}, "completion": {"prompt": "tom", "completion": "3"}}
    for fmt, row in rows.items():
        for text in ({}, {name: f"{tokenizer.bos_token}{value}" for name, value in list(row.items())[:1]}):
            (example,) = encode(Rows([row | text], fmt, "here"), tokenizer, template="plain").examples
            assert example.ids.count(start) == 1, text
