"""Whether PyTorch opens a PEFT folder: every tensor finds a place, and every place has its tensor.

On a model without weights (the meta device), so that a large one is as quick to ask as a small one.
"""

import json
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_adapters import adapter
from mlx_adapters.convert.against_torch import auto_class, quiet_transformers
from mlx_adapters.errors import AdapterError, AdaptersError, one_line
from mlx_adapters.models import config as model_config
from mlx_adapters.models import load as models
from mlx_adapters.models.names import into_config
from mlx_adapters.models.saved_forms import encoded

__all__ = ["NOT_COMPARED", "OPENED", "check_opens"]

OPENED = "opened with peft on an empty model of the base: no missing and no unexpected tensor"
NOT_COMPARED = "not compared with PyTorch"
_PACKAGES = ("torch", "transformers", "peft")


def check_opens(folder: Path, base: Path | None) -> str:
    """Open the adapter `folder` on an empty model with the configuration of the folder `base`.

    Returns:
        What was done: `OPENED`, or `NOT_COMPARED` and why.

    Raises:
        AdapterError: names a tensor that the model in PyTorch lacks, or one that the file does.
    """
    if absent := [name for name in _PACKAGES if find_spec(name) is None]:
        return f"{NOT_COMPARED}: {', '.join(absent)} is not installed"
    if base is None or not (base / "config.json").exists():
        return f"{NOT_COMPARED}: its base is not here"
    try:
        network = _empty(base)
    except AdaptersError:
        raise
    except Exception as error:  # whatever transformers raises for a model it does not have
        return f"{NOT_COMPARED}: transformers does not make its base ({one_line(error)[:120]})"
    missing, unexpected = _names(network, folder)
    kind = type(network).__name__
    if unexpected:
        raise AdapterError(f"{folder}: {unexpected[0]} has no place in {kind}, so PyTorch would leave it out")
    if missing:
        raise AdapterError(
            f"{folder}: {kind} has {missing[0]} too, which the file lacks: PyTorch would train anew"
        )
    return OPENED


def _empty(base: Path) -> Any:
    import torch
    from transformers import AutoConfig

    config = models.read_config(base)
    plain = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    fields = encoded(model_config.to_transformers(into_config(plain, None)))
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-open-") as place:
        (Path(place) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        kind = auto_class(place)
        stated = AutoConfig.from_pretrained(place, trust_remote_code=False)
    with quiet_transformers(), torch.device("meta"):
        return kind.from_config(stated, trust_remote_code=False)


def _names(network: Any, folder: Path) -> tuple[list[str], list[str]]:
    """(parameters of the adapter that the file lacks, tensors of the file without a place)."""
    import torch
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    base = {f"base_model.model.{name}" for name in network.state_dict()}
    config, tensors = PeftConfig.from_pretrained(str(folder)), load_file(folder / adapter.WEIGHTS)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(network, config)
        except Exception as error:  # where a layer is none that it knows, whatever comes of that
            raise AdapterError(f"{folder}: PEFT does not open it ({one_line(error)[:200]})") from None
        keys = set_peft_model_state_dict(wrapped, tensors, low_cpu_mem_usage=True)
    own = {
        name
        for name, _ in wrapped.named_parameters()
        if name.replace(".base_layer", "").replace(".original_module", "") not in base
    }
    return sorted(own & set(keys.missing_keys or ())), sorted(keys.unexpected_keys)
