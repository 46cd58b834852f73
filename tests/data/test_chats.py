"""What is learned of a conversation: by each kind of template, token by token as in TRL's SFTTrainer."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from spoken import TEMPLATES, make_speaker

from mlx_adapters.data.sources import Rows
from mlx_adapters.data.tokens import Encoded, Example, encode
from mlx_adapters.errors import DataError
from mlx_adapters.models.chat_template import chat_prompt
from mlx_adapters.models.load import read_tokenizer

TWO_TURNS = [
    {"role": "user", "content": "tom has 3"},
    {"role": "assistant", "content": "he has 3"},
    {"role": "user", "content": "how?"},
    {"role": "assistant", "content": "so"},
]
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


def labels(example: Example) -> list[bool]:
    """Whether each token of an example has a label."""
    found = [index >= example.loss_start for index in range(len(example.ids))]
    for begin, end in example.unlabelled:
        found[begin:end] = [False] * (end - begin)
    return found


def bracketed(example: Example, tokenizer: Any) -> str:
    """The text of an example with what is learned in brackets."""
    parts, tagged = [], zip(labels(example), example.ids, strict=True)
    for learned, run in groupby(tagged, key=lambda pair: pair[0]):
        text = tokenizer.decode([id for _, id in run])
        parts.append(f"[{text}]" if learned else text)
    return "".join(parts)


def encoded(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> Encoded:
    row = {"messages": messages} | settings.pop("row", {})
    return encode(Rows([row], "messages", "here"), tokenizer, template="chat", **settings)


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


# TRL ------------------------------------------------------------------------------------------------------

# In the default run one of each kind: ChatML, thinking, headers, sentencepiece's markers, channels.
SAMPLE = ("gemma3", "llama3", "phi3", "qwen2_5")
NAMES = (
    *("cohere2", "deepseekv3", "gemma", "gemma3", "glm4moe", "lfm2", "llama3", "nemotron_3_nano", "phi3"),
    *("phi3_5", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_instruct_2507"),
)
SPECIAL = re.compile(
    r"<\|[\w▁ ]+\|>|<｜[\w▁]+｜>|</?(?:think|start_of_turn|end_of_turn|s|bos|eos)>|\[gMASK\]<sop>"
)


@pytest.fixture(scope="module")
def trl_templates() -> Path:
    trl = pytest.importorskip("trl")
    return Path(trl.__file__).parent / "chat_templates"


def speaker(template: str, folder: Path) -> Path:
    """A tokenizer of bytes with the special tokens that the template names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", *dict.fromkeys(SPECIAL.findall(template))]
    special = list(dict.fromkeys(special))
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
    )
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


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


def sampled(names: tuple[str, ...]) -> list[Any]:
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in names]


def assert_same(ours: Example, ids: list[int], learned: list[bool], tokenizer: Any) -> None:
    """The same ids and labels, but we do not learn what the generation prompt writes (some marks of TRL's
    include it), nor what stands behind the token that ends a turn."""
    mine = labels(ours)
    if len(ours.ids) > len(ids):  # GLM: the next turn's token ends an answer; TRL's last answer has no end
        ids, learned = [*ids, ours.ids[-1]], [*learned, True]
        assert ids[-1] in tokenizer.eos_token_ids
    assert ours.ids == ids
    assert not any(a and not b for a, b in zip(mine, learned, strict=True))
    asked, told = (chat_prompt(TWO_TURNS[:1], tokenizer, answer=answer) for answer in (True, False))
    begin = 0
    for more, run in groupby(b and not a for a, b in zip(mine, learned, strict=True)):
        end = begin + len(list(run))
        text = tokenizer.decode(ids[begin:end])
        if more and end < len(ids) and mine[end]:
            assert text in asked[len(told) :]
        elif more:
            assert mine[begin - 1]
            assert ids[begin - 1] in tokenizer.eos_token_ids
            assert not text.strip() or ids[end - 1] in tokenizer.all_special_ids
        begin = end


@pytest.mark.parametrize("name", sampled(NAMES))
def test_answers_are_those_that_trl_learns(
    name: str, trl_templates: Path, trained: Any, tmp_path: Path
) -> None:
    """Every answer of a conversation, by the marks in TRL's training template; ours are found."""
    template = (trl_templates / f"{name}_training.jinja").read_text()
    folder = speaker(template, tmp_path)
    tokenizer = read_tokenizer(folder, {})
    ids, learned = trained(folder, {"messages": TWO_TURNS}, assistant_only_loss=True)
    (ours,) = encoded(tokenizer, TWO_TURNS).examples
    assert_same(ours, ids, learned, tokenizer)


@pytest.mark.parametrize("name", sampled(NAMES))
def test_a_completion_is_that_which_trl_learns(
    name: str, trl_templates: Path, trained: Any, tmp_path: Path
) -> None:
    """One question and its answer, by the template as published."""
    template = (trl_templates / f"{name}.jinja").read_text()
    folder = speaker(template, tmp_path)
    tokenizer = read_tokenizer(folder, {})
    row = {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]}
    ids, learned = trained(folder, row, completion_only_loss=True)
    (ours,) = encoded(tokenizer, TWO_TURNS[:2]).examples
    assert_same(ours, ids, learned, tokenizer)
