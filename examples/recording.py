"""Record `mlx-adapters quickstart` as an animated picture: docs/quickstart.svg, which README shows.

    python examples/recording.py [OUTPUT.svg] [--command "..."] [--rows 26] [--seconds 16]
    python examples/recording.py docs/data-show.svg --still --folder FOLDER --command "..."

The command runs on a pseudo-terminal in an empty folder, or in FOLDER. The picture shows what it printed,
letter by letter, as a time lapse. Nothing else is drawn but the prompt, the command and the title, which says
how long it took. The colours follow the reader's light or dark setting; without animation, as with --still,
the last screen is seen.
"""

import argparse
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLUMNS, WIDTH, HEIGHT, MARGIN = 88, 8.4, 19, 16  # of a character and the border, in pixels
HOLD = 0.3  # the last screen stays for this share of the whole
# SGR code -> colour on a light and on a dark background; those with a semicolon are of Rich's bars
COLOURS = {None: ("#24292f", "#d0d7de"), "31": ("#b3261e", "#ff7b72"), "32": ("#1a7f37", "#56d364")}
COLOURS |= {"33": ("#7d4e00", "#e3b341"), "34": ("#0550ae", "#79c0ff"), "35": ("#8250df", "#d2a8ff")}
COLOURS |= {"36": ("#0b6b75", "#56d4dd"), "90": ("#8c959f", "#6e7681")}
COLOURS |= {"1;35": COLOURS["35"], "2": COLOURS["90"]}  # bold and dim, as Rich writes them
COLOURS |= {"38;5;197": COLOURS["34"], "38;5;70": COLOURS["32"], "38;5;237": COLOURS["90"]}
CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")

Cell = tuple[str, str | None]  # a character and its colour
Line = tuple[Cell, ...]


@dataclass
class Version:
    """What a line of the screen showed from `start` to `end`, in seconds; None: to the end."""

    row: int
    line: Line
    start: float
    end: float | None = None


def record(command: list[str], folder: Path) -> list[tuple[float, str]]:
    """Run the command on a terminal of its own: (seconds since its start, what it printed) piece by piece."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    for name in ("COLORTERM", "NO_COLOR"):
        environment.pop(name, None)
    start, pieces = time.monotonic(), []
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    while True:
        try:
            text = os.read(leader, 65536).decode(errors="replace")
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not text:
            break
        pieces.append((time.monotonic() - start, text))
    os.close(leader)
    if process.wait() != 0:
        raise SystemExit("".join(text for _, text in pieces))
    return pieces


class Screen:
    """The terminal's lines after each piece of text; `versions` has all that a line ever showed."""

    def __init__(self) -> None:
        self.lines: list[list[Cell]] = [[]]
        self.row = self.column = 0
        self.colour: str | None = None
        self.versions: list[Version] = []

    def write(self, text: str) -> None:
        place = 0
        while place < len(text):
            if code := CODE.match(text, place):
                place = code.end()
                self._act(code[1], code[2])
                continue
            letter, place = text[place], place + 1
            if letter == "\r":
                self.column = 0
            elif letter == "\n":
                self._down()
            elif letter.isprintable():
                if self.column == COLUMNS:  # the line is full: the next one takes the rest
                    self._down()
                    self.column = 0
                line = self.lines[self.row]
                line += [(" ", None)] * (self.column + 1 - len(line))
                line[self.column] = (letter, self.colour)
                self.column += 1

    def _down(self) -> None:
        self.row += 1
        self.lines += [[] for _ in range(self.row + 1 - len(self.lines))]

    def _act(self, numbers: str, code: str) -> None:
        if code == "A":
            self.row = max(0, self.row - int(numbers or 1))
        elif code == "K":
            self.lines[self.row] = [] if numbers == "2" else self.lines[self.row][: self.column]
        elif code == "m":
            self.colour = numbers if numbers in COLOURS else None

    def show(self, now: float) -> None:
        """Keep what differs from the time before."""
        current = {version.row: version for version in self.versions if version.end is None}
        for row, cells in enumerate(self.lines):
            line, before = tuple(cells), current.get(row)
            if before is None or before.line != line:
                if before is not None:
                    before.end = now
                self.versions.append(Version(row, line, now))


def play(pieces: list[tuple[float, str]], command: str, seconds: float) -> list[Version]:
    """The screen's history, `seconds` long, in at most eight pictures a second."""
    screen, whole = Screen(), max(pieces[-1][0], 1e-9)
    screen.colour = "32"
    screen.write("$ ")
    screen.colour = None
    screen.write(f"{command}\r\n")
    screen.show(0.0)
    shown = 0.0
    for (at, text), (following, _) in zip(pieces, [*pieces[1:], (float("inf"), "")]):
        screen.write(text)
        now = max(at / whole * seconds, 0.5)
        if following / whole * seconds - shown >= 1 / 8:
            screen.show(now)
            shown = now
    return screen.versions


def draw(versions: list[Version], title: str, rows: int, seconds: float) -> str:
    """The picture, whose screen is `rows` high and moves up as it fills."""
    length = seconds / (1 - HOLD)
    windows: dict[tuple[float, float | None], str] = {}
    drawn = []
    for version in versions:
        if not (runs := _runs(version.line)):
            continue
        name = windows.setdefault((version.start, version.end), f"w{len(windows)}")
        y = version.row * HEIGHT
        text = "".join(
            f'<text class="{_class(colour)}" x="{x * WIDTH:.1f}" y="{y}" '
            f'textLength="{len(text) * WIDTH:.1f}">'
            f"{escape(text)}</text>"
            for x, text, colour in runs
        )
        hidden = "" if version.end is None else ' visibility="hidden"'
        drawn.append(f'<g class="{name}"{hidden}>{text}</g>')
    styles = [
        f"@keyframes {name}{{0%{{visibility:hidden}}{100 * start / length:.2f}%{{visibility:visible}}"
        + ("" if end is None else f"{100 * end / length:.2f}%,100%{{visibility:hidden}}")
        + f"}}#screen .{name}{{animation-name:{name}}}"
        for (start, end), name in windows.items()
    ]
    tops: dict[float, int] = {0.0: 0}  # when -> the first row on the screen
    for version in versions:
        if version.line:
            tops[version.start] = max(*tops.values(), version.row + 1 - rows)
    scroll = "".join(
        f"{100 * start / length:.2f}%{{transform:translateY({-top * HEIGHT}px)}}"
        for start, top in {**tops, length: max(tops.values())}.items()
    )
    width = COLUMNS * WIDTH + 2 * MARGIN
    body = "\n".join(drawn)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {rows * HEIGHT + 70}">
<title>{escape(title)}</title>
<style>
text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}}
.back{{fill:#f6f8fa;stroke:#d0d7de}}
{_colours(0)}
@media (prefers-color-scheme:dark){{.back{{fill:#0d1117;stroke:#30363d}}{_colours(1)}}}
#screen,#screen g{{animation:{length:.1f}s step-end infinite}}
#screen{{animation-name:scroll}}
@keyframes scroll{{{scroll}}}
{"".join(styles)}
@media (prefers-reduced-motion:reduce){{#screen,#screen g{{animation:none!important}}}}
</style>
<rect class="back" x="0.5" y="0.5" width="{width - 1:.0f}" height="{rows * HEIGHT + 69}" rx="8"/>
<text class="{_class("90")}" x="{width / 2:.0f}" y="24" text-anchor="middle">{escape(title)}</text>
<svg x="{MARGIN}" y="40" width="{width - 2 * MARGIN:.0f}" height="{rows * HEIGHT + 8}" overflow="hidden">
<g transform="translate(0 14)"><g id="screen" transform="translate(0 {-max(tops.values()) * HEIGHT})">
{body}
</g></g>
</svg>
</svg>
"""


def _colours(scheme: int) -> str:
    return "".join(f".{_class(code)}{{fill:{both[scheme]}}}" for code, both in COLOURS.items())


def _class(colour: str | None) -> str:
    return "c" + (colour or "").replace(";", "-")


def _runs(line: Line) -> list[tuple[int, str, str | None]]:
    """(column, text, colour) of a line: what stands between two blanks or more, or has another colour."""
    text = "".join(letter for letter, _ in line)
    runs: list[tuple[int, str, str | None]] = []
    for words in re.finditer(r"\S+(?: \S+)*", text):
        start = words.start()
        for column in range(start + 1, words.end() + 1):
            if column == words.end() or (line[column][1] != line[start][1] and line[column][0] != " "):
                piece = text[start:column]
                runs.append((start, piece.rstrip(), line[start][1]))
                start = column
    return runs


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("docs/quickstart.svg"))
    parser.add_argument("--command", default="mlx-adapters quickstart")
    parser.add_argument("--rows", type=int, default=26)
    parser.add_argument("--seconds", type=float, default=16.0)
    parser.add_argument("--still", action="store_true", help="the last screen, whole")
    parser.add_argument("--folder", type=Path, help="run the command there")
    options = parser.parse_args()
    name, *arguments = shlex.split(options.command)
    program = Path(sys.executable).with_name(name)  # that of the running environment comes first
    command = [str(program) if program.exists() else name, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        pieces = record(command, options.folder or Path(folder))
    minutes, rest = divmod(round(pieces[-1][0]), 60)
    title = f"time lapse: {minutes} min {rest:02d} s in {options.seconds:.0f} s"
    versions = play(pieces, options.command, options.seconds)
    if options.still:
        versions = [Version(one.row, one.line, 0.0) for one in versions if one.end is None]
        options.rows, title = 1 + max(one.row for one in versions if one.line), "mlx-adapters data show"
    options.output.write_text(draw(versions, title, options.rows, options.seconds), encoding="utf-8")
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
