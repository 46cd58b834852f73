"""Check a converted model folder against transformers, in float32 on a few prompts."""

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.convert.against_torch import (
    auto_class,
    bound,
    logits,
    max_diff,
    quiet_transformers,
    require,
    require_class,
)
from mlx_adapters.convert.gguf import family_in
from mlx_adapters.convert.gguf_file import read_container
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.files import weights
from mlx_adapters.files.documents import read_object
from mlx_adapters.models import load as models

__all__ = ["ModelVerdict", "verify_model"]

_PROMPTS = (
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "The capital of France is",
    "Below is an instruction that describes a task. Write a response that completes the request.",
)


@dataclass(frozen=True, kw_only=True)
class ModelVerdict:
    """How a converted model compares with transformers.

    `max_diff` is max|logit difference| and must not exceed `bound`, 1e-5 + 1e-5 * max|logit|. A lossless
    conversion is compared with the source itself. One that rounded the weights cannot equal its source:
    `lossless` is False then, `max_diff` compares with the same rounded weights in transformers, and
    `argmax_agreement` (the share of positions with the same most likely token) always with the source.
    """

    max_diff: float
    bound: float
    argmax_agreement: float
    lossless: bool

    @property
    def passed(self) -> bool:
        """Whether transformers computes the same function."""
        return self.max_diff <= self.bound and (not self.lossless or self.argmax_agreement == 1.0)

    def __str__(self) -> str:
        """The comparison in one line."""
        against = "transformers" if self.lossless else "transformers with the same rounded weights"
        return (
            f"verify: max |logit difference| {self.max_diff:.1e} to {against} (bound {self.bound:.1e}), "
            f"same most likely token as the source at {self.argmax_agreement:.1%} of positions: "
            f"{'passed' if self.passed else 'FAILED'}"
        )


def verify_model(src: Path | str, dst: Path) -> ModelVerdict:
    """Compare the converted folder `dst` with `src` (folder, hub id or .gguf file) opened by transformers.

    UnsupportedError without torch and transformers.
    """
    require()
    loaded = models.load(dst, dtype="float32")
    loaded.model.eval()
    prompts = [loaded.tokenizer.encode(text) for text in _PROMPTS]
    ours = logits(loaded.model, prompts)
    with quiet_transformers():
        source = _source_logits(src, prompts, dst)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(ours, source, strict=True))
    agreement = same / sum(map(len, prompts))
    lossless = max_diff(ours, source) <= bound(source) or not _may_round(src, dst)
    theirs = source
    if not lossless:
        with tempfile.TemporaryDirectory(prefix="mlx-adapters-verify-") as temporary:
            theirs = _logits(write_transformers(loaded.model, loaded.config, Path(temporary)), prompts)
    return ModelVerdict(
        max_diff=max_diff(ours, theirs),
        bound=bound(theirs),
        argmax_agreement=agreement,
        lossless=lossless,
    )


def _source_logits(src: Path | str, prompts: list[list[int]], dst: Path) -> list[np.ndarray]:
    path = Path(src)
    if path.suffix == ".gguf":
        return _gguf_logits(path, prompts, dst)
    folder = models.locate(src)
    config = models.read_config(folder)
    require_class(config["model_type"])
    if config.get("quantization"):
        raise UnsupportedError(f"--verify: {src} is quantized for MLX already, transformers cannot open it")
    return _logits(folder, prompts)


def _gguf_logits(file: Path, prompts: list[list[int]], dst: Path) -> list[np.ndarray]:
    """Those of the file opened by transformers. Of the metadata transformers leaves out windows and scaled
    rotations, so it is given the configuration in `dst`; the tensors it reads by its own rules."""
    if find_spec("gguf") is None:
        raise UnsupportedError("--verify of a .gguf file needs the package gguf: pip install gguf")
    family, found = family_in(read_container(file))
    if not family.in_transformers:
        raise UnsupportedError(
            f"--verify: transformers does not read GGUF files of architecture {found.arch!r} right: there is "
            f"nothing to compare with. {dst} is complete"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(dst)
    vars(config).pop("quantization_config", None)  # MLX's, of the converted weights
    return _logits(file.parent, prompts, gguf_file=file.name, config=config)


def _logits(folder: Path, prompts: list[list[int]], **options: Any) -> list[np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM if options else auto_class(folder)
    model = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False, **options
    ).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


def _may_round(src: Path | str, dst: Path) -> bool:
    """Whether the conversion changed the numbers: quantized them, or changed their type."""
    config = read_object(dst / "config.json", CheckpointError)
    if config.get("quantization"):
        return True
    if Path(src).suffix == ".gguf":
        return False
    kinds = _float_types(models.locate(src))
    return bool(kinds) and kinds != _float_types(dst)


def _float_types(folder: Path) -> set[str]:
    entries = [entry for file in weights.weight_files(folder) for entry in weights.header(file).values()]
    return {entry["dtype"] for entry in entries if "F" in entry["dtype"]}
