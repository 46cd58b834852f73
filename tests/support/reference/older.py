"""Run with another Python: open checkpoints and adapters with the transformers of that environment.

    python older.py JOBS IDS

JOBS is a JSON list of [checkpoint, adapter or "", file to write], IDS a JSON list of rows of token ids.
Writes the logits, after checking that every weight was found; an adapter is attached by the loader in its
folder.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(jobs: str, ids: str) -> None:
    rows = torch.tensor(json.loads(Path(ids).read_text()))
    for checkpoint, adapter, out in json.loads(Path(jobs).read_text()):
        network, said = AutoModelForCausalLM.from_pretrained(
            checkpoint, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        strange = [*said["missing_keys"], *said["unexpected_keys"]]
        if strange:
            raise SystemExit(f"{checkpoint}: {strange}")
        network.eval()
        if adapter:
            spec = importlib.util.spec_from_file_location("load_adapter", Path(adapter) / "load_adapter.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            network = module.load_adapter(network, adapter)
        with torch.no_grad():
            np.save(out, network(rows).logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
