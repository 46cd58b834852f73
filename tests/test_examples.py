"""The examples run as their first lines say."""

import subprocess
import sys
from pathlib import Path

from tiny import make_tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_method_from_outside_trains_and_loads(tmp_path: Path) -> None:
    """Adding a method touches its file only: this one is not even in the package."""
    folder = make_tiny("llama", tmp_path)
    command = [sys.executable, str(EXAMPLES / "02_new_method.py"), str(folder), str(tmp_path / "ssf")]
    done = subprocess.run([*command, "--steps", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "loaded again: 14 layers" in done.stdout
    assert (tmp_path / "ssf" / "adapter_model.safetensors").exists()
