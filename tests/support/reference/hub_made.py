"""Runs in the second virtual environment: adapters that AdapterHub's library itself makes and saves.

python hub_made.py JOBS.json IDS.json

JOBS: [{"base": MODEL, "folder": NEW, "config": NAME, "fields": {..}, "interface": {..} or null,
"safetensors": true or false, "out": OUT.npz}, ...]. OUT.npz: `plain` and `logits`, and the `tokens` that a
cached greedy generation adds.
"""

import json
import sys
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
from adapters import AdapterConfig, AdapterModelInterface
from transformers import AutoModelForCausalLM


def run(job: dict[str, Any], ids: torch.Tensor) -> dict[str, np.ndarray]:
    """The adapter's arrays are moved away from their start, as training would."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=torch.float32, attn_implementation="eager"
    )
    told = job["interface"]
    adapters.init(model, interface=AdapterModelInterface(**told) if told else None)
    model.eval()
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.numpy()
        model.add_adapter("trained", config=AdapterConfig.load(job["config"], **job["fields"]))
        model.set_active_adapters("trained")
        for name, parameter in model.named_parameters():
            if ".trained." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        logits = model(ids, use_cache=False).logits.numpy()
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_adapter(job["folder"], "trained", use_safetensors=job["safetensors"], with_head=False)
    return {"plain": plain, "logits": logits, "tokens": tokens[:, ids.shape[1] :].numpy()}


jobs, ids = (json.loads(Path(argument).read_text()) for argument in sys.argv[1:])
for job in jobs:
    np.savez(job["out"], **run(job, torch.tensor(ids)))
