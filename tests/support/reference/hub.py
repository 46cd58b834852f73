"""Runs in the second virtual environment: logits of AdapterHub's library for adapter folders.

python hub.py JOBS.json IDS.json        JOBS: [[MODEL, ADAPTER, OUT.npy], ...]
"""

import json
import sys
from pathlib import Path

import adapters
import numpy as np
import torch
from adapters import AdapterModelInterface
from transformers import AutoModelForCausalLM


def run(base: str, folder: Path, ids: torch.Tensor) -> np.ndarray:
    """[logits without the adapter, logits with it]."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    told = folder / "adapter_interface.json"
    interface = json.loads(told.read_text())["interface"] if told.exists() else None
    adapters.init(model, interface=AdapterModelInterface(**interface) if interface else None)
    with torch.no_grad():
        plain = model.eval()(ids, use_cache=False).logits.numpy()
        model.load_adapter(str(folder), use_safetensors=True, set_active=True)
        return np.stack([plain, model.eval()(ids, use_cache=False).logits.numpy()])


jobs, ids = (json.loads(Path(argument).read_text()) for argument in sys.argv[1:])
for base, folder, out in jobs:
    np.save(out, run(base, Path(folder), torch.tensor(ids)))
