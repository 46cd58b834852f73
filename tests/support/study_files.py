"""A study of a tiny model."""

import json
from pathlib import Path
from typing import Any


def study_file(folder: Path, model: Path, **changes: Any) -> Path:
    """Two methods, two sizes each; JSON is YAML."""
    content: dict[str, Any] = {
        "name": "Tiny <study>",
        "model": str(model),
        "rows": 20,
        "limit": 4,
        "max_tokens": 4,
        "train": {"steps": 4, "batch_size": 2, "max_length": 48, "warmup": 0, "save_every": 2},
        "grid": [
            {"method": "lora", "placement": {"attn": {"targets": "attn"}}, "size": {"rank": [2, 4]}},
            {"method": "prefix", "size": {"num_virtual_tokens": [2, 3]}},
        ],
    } | changes
    file = folder / "study.yaml"
    file.write_text(json.dumps(content))
    return file
