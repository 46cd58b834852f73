"""What transformers makes of a folder that we wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapted import IDS


def in_torch(folder: Path, **more: Any) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    network, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **more
    )
    assert not said["missing_keys"], said["missing_keys"]
    assert not said["unexpected_keys"], said["unexpected_keys"]
    with torch.no_grad():
        return network.eval()(torch.tensor(IDS.tolist())).logits.numpy()
