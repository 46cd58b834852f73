"""What a fresh interpreter says, and the marks of what only some machines can be asked."""

import json
import os
import subprocess
import sys
from importlib import util
from typing import Any

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has a fast BLAS built in")


openblas = pytest.mark.skipif(
    sys.platform != "linux" or util.find_spec("scipy_openblas32") is None,
    reason='needs pip install "mlx-adapters[cpu]" on Linux',
)


def run(code: str, **environment: str) -> Any:
    """The JSON that `code` prints in a fresh interpreter; its stderr must stay empty."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)
