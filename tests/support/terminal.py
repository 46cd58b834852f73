"""A terminal for tests: a program runs on a pseudo-terminal, and what its screen would show is kept."""

import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Sequence

__all__ = ["Terminal", "shown"]

_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class Terminal:
    """A program with a terminal of its own, `columns` wide; closing it sends SIGHUP, as a window does."""

    def __init__(self, command: Sequence[str], *, columns: int = 100) -> None:
        self.leader, follower = pty.openpty()
        self.text = ""

        def take() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            list(command),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=os.environ | {"COLUMNS": str(columns)},
            preexec_fn=take,
        )
        os.close(follower)

    def read(self, seconds: float = 0.1) -> None:
        """Take what has been printed, waiting so long for something."""
        while select.select([self.leader], [], [], seconds)[0]:
            try:
                got = os.read(self.leader, 65536)
            except OSError:  # it has ended
                return
            if not got:
                return
            self.text += got.decode(errors="replace")
            seconds = 0.0

    def wait_for(self, words: str, *, since: int = 0, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.text[since:]:
            assert time.monotonic() < end, self.text[-2000:]
            assert self.process.poll() is None or words in self.text[since:], self.text[-2000:]
            self.read()

    def press(self, keys: bytes) -> None:
        os.write(self.leader, keys)

    def end(self, seconds: float = 120.0) -> int:
        """Its exit code; `text` is complete then."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text[-2000:]
            self.read()
        self.read()
        return self.process.returncode

    def close(self) -> None:
        os.close(self.leader)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def shown(text: str) -> list[str]:
    """The lines that a terminal shows after `text`: carriage returns, cursor movements and erasing done."""
    lines, row, column, place = [""], 0, 0, 0
    while place < len(text):
        code = _CODE.match(text, place)
        if code:
            place = code.end()
            if code[2] == "A":
                row = max(0, row - int(code[1] or 1))
            elif code[2] == "K":
                lines[row] = "" if code[1] == "2" else lines[row][:column]
            continue
        letter = text[place]
        place += 1
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + letter + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
