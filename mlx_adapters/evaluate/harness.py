"""Our model and adapter as a model of EleutherAI's lm-evaluation-harness (`lm_eval`, the extra `lm-eval`).

https://github.com/EleutherAI/lm-evaluation-harness. Its tasks ask for the log-likelihood of texts or for
answers; both go through this package's batched decoding, whatever the method of the adapter.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from mlx_adapters.adapter.call import before_text
from mlx_adapters.data.tokens import end_id
from mlx_adapters.errors import ConfigError, DataError, UnsupportedError
from mlx_adapters.generate.decode import Decoding, generate_ids
from mlx_adapters.generate.likelihood import scored
from mlx_adapters.generate.text import way_of
from mlx_adapters.generate.using import meta_of, opened, using
from mlx_adapters.models.chat_template import chat_prompt, chat_writer
from mlx_adapters.models.limits import made_for
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.models.own_template import OWN, ChatTemplate

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ImportError:
    raise UnsupportedError(
        'lm-evaluation-harness is not installed: pip install "mlx-adapters[lm-eval]"'
    ) from None

__all__ = ["HarnessModel", "columns", "rows", "run_tasks"]

_LONGEST = 2048  # tokens, where the model's configuration names no limit: lm_eval's own default
_ANSWER = 256  # tokens of an answer, where the task does not say


class HarnessModel(TemplateLM):
    """`loaded` (with its adapter, if any) as `lm_eval` wants it; `batch_size` rows go together, and `chat` is
    how conversations are written."""

    def __init__(
        self, loaded: LanguageModel, *, batch_size: int | None = None, chat: ChatTemplate = OWN
    ) -> None:
        super().__init__()
        self.loaded, self.batch_size = loaded, batch_size
        self.tokenizer = chat.on(loaded.tokenizer)
        self.max_length = (made_for(loaded.config) or _LONGEST) - before_text(loaded.model)

    @property
    def eot_token_id(self) -> int:
        end = end_id(self.tokenizer)
        if end is None:
            raise UnsupportedError("the tokenizer has no end token, which this task needs")
        return end

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.path.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; a beginning-of-text token that is there already is not added again."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model's own template writes it, or the one that the adapter learned."""
        if add_generation_prompt:
            return chat_prompt(chat_history, self.tokenizer)
        kwargs = getattr(self.tokenizer, "chat_template_kwargs", {})
        text: str = chat_writer(self.tokenizer)(
            chat_history, tokenize=False, continue_final_message=True, **kwargs
        )
        return text

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log p, greedy) of each (texts, context ids, continuation ids); a context is read once."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (_texts, context, continuation) in enumerate(requests):
            kept = self.max_length - len(continuation) + 1
            places.setdefault(tuple(context[max(0, len(context) - kept) :]), []).append(place)
        items = [(context, [requests[p][2] for p in asked]) for context, asked in places.items()]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        asked = list(places.values())
        for index, scores in scored(self.loaded.model, items, batch_size=self.batch_size):
            for place, score in zip(asked[index], scores, strict=True):
                answers[place] = score
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the model's length that share no token."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, settings), up to the first of its stop texts."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for asked in alike.values():
            contexts = [requests[place].args[0] for place in asked]
            for place, text in zip(asked, self._answers(contexts, requests[asked[0]].args[1]), strict=True):
                answers[place] = text
        return answers

    def _answers(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(dict(settings), _ANSWER)
        end = end_id(self.tokenizer)
        eos = None if end is None else self.tokenizer.decode([end])
        stops = handle_stop_sequences(options.get("until"), eos=eos)
        limit = int(options["max_gen_toks"])
        room = self.max_length - limit
        if room < 1:
            raise ConfigError(f"max_gen_toks {limit} leaves no room for a prompt in {self.max_length} tokens")
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        tail = max(map(len, stops)) + 4  # a stop text has at most as many tokens as letters

        def until(_: int, ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-tail:])
            return any(stop in text for stop in stops)

        answers = dict(
            generate_ids(
                self.loaded.model,
                prompts,
                stop=frozenset(int(token) for token in self.tokenizer.eos_token_ids),
                max_tokens=limit,
                batch_size=self.batch_size,
                decoding=_decoding(options),
                until=until,
            )
        )
        texts = (self.tokenizer.decode(answers[i], skip_special_tokens=True) for i in range(len(prompts)))
        return [postprocess_generated_text(text, stops, think_end_token=None) for text in texts]


def _decoding(options: dict[str, Any]) -> Decoding:
    """A task's settings; sampling without a limit draws from the whole vocabulary."""
    if not options.get("do_sample") or not options.get("temperature"):
        return Decoding()
    return Decoding(
        kind="sample",
        temperature=float(options["temperature"]),
        top_p=float(options.get("top_p", 1.0)),
        top_k=int(options.get("top_k") or 1 << 30),
    )


def run_tasks(
    model: LanguageModel | str | Path,
    tasks: Sequence[str],
    *,
    adapter: str | Path | None = None,
    batch_size: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    chat_template_kwargs: str | Mapping[str, Any] | None = None,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """lm_eval's results, with its standard errors, and samples as plain JSON values, by its own
    `simple_evaluate`.

    With `chat_template` prompts are written as the adapter's conversations were, or by the model's own
    template; `chat_template_kwargs` are its variables. `include_path` is a folder of YAML tasks of yours;
    lm_eval runs the Python that they name.
    Raises ConfigError for a task that lm_eval does not know, DataError where it cannot load one: without a
    network, say. Code that a task marks as unsafe is not run.
    """
    from lm_eval import simple_evaluate

    if not tasks:
        raise ConfigError("--tasks is empty: name tasks of lm_eval, as in --tasks arc_easy,piqa")
    if chat_template_kwargs and not chat_template:
        raise ConfigError("chat_template_kwargs are read with --apply-chat-template: give that too")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder")
    manager, unknown = _managed(tasks, include_path)
    if unknown:
        raise ConfigError(
            f"lm_eval knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists its own, "
            "--include-path adds a folder of YAML files"
        )
    manager.load = partial(_load, manager.load)
    loaded, meta = opened(model), meta_of(model, adapter)
    loaded.model.eval()
    chat = way_of(loaded, meta, "chat", chat_template_kwargs).chat if chat_template else OWN
    with using(loaded, adapter), _one_process(), redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model=HarnessModel(loaded, batch_size=batch_size, chat=chat),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            task_manager=manager,
        )
    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return plain


@contextmanager
def _one_process() -> Iterator[None]:
    """Standard errors without a formula are bootstrapped: not in processes forked from one that runs MLX.

    The draws are the same, by lm_eval's own seeds.
    """
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load(load: Callable[[Any], Any], tasks: list[str]) -> Any:
    """`load` with one line for all that the hub, a dataset or a YAML file may raise."""
    try:
        return load(tasks)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise DataError(
            f"{', '.join(tasks)}: lm_eval cannot load it ({type(error).__name__}: {reason}). The data come "
            "from the hub, once; without a network, name tasks over files of yours with --include-path"
        ) from None


def _managed(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """lm_eval's task manager, and the names among `tasks` it does not know.

    Its own fourteen thousand YAML files take seconds to index: only where the folder lacks a name.
    """
    from lm_eval.tasks import TaskManager

    for defaults in (False, True) if include_path else (True,):
        manager = TaskManager(
            include_path=str(include_path) if include_path else None, include_defaults=defaults
        )
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            break
    return manager, unknown


def columns() -> list[str]:
    """The heads of a table of results, whose lines are `rows`."""
    return ["task", "metric", "filter", "value", "standard error", "items"]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """One row per metric: lm_eval names it `metric,filter` and its standard error `metric_stderr,filter`."""
    rows = []
    for task, metrics in found["results"].items():
        items = str(found["n-samples"].get(task, {}).get("effective", ""))
        for key, value in metrics.items():
            metric, comma, rule = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{rule}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                rows.append([task, metric, rule, f"{value:.4f}", shown, items])
    return rows
