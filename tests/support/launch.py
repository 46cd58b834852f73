"""mlx.launch, and free ports for the processes that it starts."""

import os
import socket
import sys
from pathlib import Path

LAUNCH = Path(sys.executable).with_name("mlx.launch")


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in range(23000 + os.getpid() % 5000, 60000, 50):
        try:
            for port in range(first, first + count):
                with socket.socket() as tried:
                    tried.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")
