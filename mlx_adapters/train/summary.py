"""What a run is about to do, in sentences."""

from mlx_adapters.data.picked import lengths_of
from mlx_adapters.data.preview import as_trained
from mlx_adapters.data.showing import Shown
from mlx_adapters.errors import counted
from mlx_adapters.models.limits import made_for
from mlx_adapters.train.length import EPOCHS, epochs
from mlx_adapters.train.loop import Run
from mlx_adapters.train.trainer import Trainer
from mlx_adapters.train.wording import without_start

__all__ = ["first_row", "summary"]

_MANY_CUT = 0.05  # the share of rows that may lose their end without a word


def summary(trainer: Trainer) -> list[str]:
    """What will be trained, on which rows, and what about them a user would not expect."""
    names = sorted({path.rpartition(".")[2] for path in trainer.paths})
    ratio = trainer.trainable / trainer.parameters
    sentences = [
        f"{trainer.meta.method.NAME} on {counted(len(trainer.paths), 'layer')} ({', '.join(names)})",
        f"trainable {trainer.trainable:,} of {trainer.parameters:,} parameters ({ratio:.3%})",
        _rows(trainer),
        *_measured(trainer),
    ]
    if trainer.encoded.endless:
        sentences.append("the tokenizer has no end token: answers will not learn where to end")
    cut, rows = trainer.encoded.truncated, len(trainer.encoded.examples) + trainer.encoded.dropped
    if cut > _MANY_CUT * rows and trainer.config.long_rows != "split":
        sentences.append(
            f"{cut / rows:.0%} of the rows are over {trainer.config.max_length} tokens: --max-length "
            f"{trainer.encoded.longest} keeps all whole, and takes more memory"
        )
    sentences += without_start(trainer.meta.chat, trainer.model.tokenizer, trainer.run.examples)
    long = made_for(trainer.model.config)
    if long and (over := int((lengths_of(trainer.run.examples) > long).sum())):
        sentences.append(f"{over} rows are longer than the {long} tokens that the model was made for")
    return sentences + _length(trainer.run)


def first_row(trainer: Trainer) -> list[Shown]:
    """The first example of a run as it is trained, to be printed."""
    return as_trained(0, trainer.encoded.examples[0], trainer.model.tokenizer)


def _rows(trainer: Trainer) -> str:
    text = f"{counted(len(trainer.run.examples), 'row')} to train on"
    text += f", template {trainer.meta.template}, loss on {trainer.meta.loss_on}"
    encoded = trainer.encoded
    counts = (
        (trainer.excluded, "left out because they stand in the excluded files"),
        (encoded.truncated, encoded.in_words),
        (encoded.dropped, "dropped: nothing to learn within the max length"),
        (encoded.empty, "with an empty answer"),
        (encoded.repeated, "the same as an earlier row"),
        (encoded.rewritten, "for an earlier answer that a whole chat has otherwise, or without an end token"),
    )
    return text + "".join(f"; {count} {what}" for count, what in counts if count)


def _measured(trainer: Trainer) -> list[str]:
    """What is measured on the way, and what decides which step is the best."""
    config, sets = trainer.config, trainer.watch.sets
    found = []
    if trainer.measured_on:
        found.append(f"{trainer.measured_on}, every {counted(config.validate_every, 'step')}")
    if sets:
        names = ", ".join(f"{counted(len(items), 'item')} of {task.name}" for task, items in sets)
        every = config.eval_every or config.validate_every
        found.append(f"accuracy on {names}, every {counted(every, 'step')}")
    return found


def _length(run: Run) -> list[str]:
    """What a user who chose no number of steps, or too many of warm-up, would not expect."""
    config, sentences = run.config, []
    if config.steps is None and config.epochs is None:
        passes = epochs(run.examples, config, run.processes.size)
        if passes > EPOCHS:
            sentences.append(
                f"few rows: {passes} epochs instead of {EPOCHS} make {run.total} steps. --epochs chooses"
            )
    if run.warmup == run.total:
        sentences.append(
            f"all {run.total} steps are warm-up, so the rate stays below {config.lr:g}. Lower --warmup"
        )
    return sentences
