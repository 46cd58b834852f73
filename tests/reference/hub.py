"""Runs in the second virtual environment: logits of AdapterHub's library for an adapter folder.

python hub.py MODEL ADAPTER IDS.json OUT.npy
"""

import json
import sys
from pathlib import Path

import adapters
import numpy as np
import torch
from adapters import AdapterModelInterface
from transformers import AutoModelForCausalLM


def main() -> None:
    base, folder, ids, out = (Path(argument) for argument in sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    told = folder / "adapter_interface.json"
    if told.exists():
        interface = AdapterModelInterface(**json.loads(told.read_text())["interface"])
        adapters.init(model, interface=interface)
    else:
        adapters.init(model)
    with torch.no_grad():
        given = torch.tensor(json.loads(ids.read_text()))
        plain = model.eval()(given, use_cache=False).logits.numpy()
        model.load_adapter(str(folder), use_safetensors=True, set_active=True)
        ours = model.eval()(given, use_cache=False).logits.numpy()
        np.save(out, np.stack([plain, ours]))


main()
