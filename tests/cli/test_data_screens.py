"""`data show` and `data stats` on terminals of 80 and 120 columns, dark and light."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from spoken import make_speaker
from terminal import Terminal, shown

from mlx_adapters.data.preview import described, row_statistics, show_rows
from mlx_adapters.data.showing import _STYLES, Shown, in_colour, in_marks

# Magenta, and where bold text is drawn in the bright colour bright magenta, as terminals come.
PALETTES = {
    "xterm": ((205, 0, 205), (255, 0, 255)),
    "Terminal": ((178, 0, 178), (229, 0, 229)),
    "VS Code, dark": ((188, 63, 188), (214, 112, 214)),
    "VS Code, light": ((188, 5, 188), (188, 5, 188)),
    "GNOME": ((163, 71, 186), (192, 97, 203)),
    "Windows": ((136, 23, 152), (180, 0, 158)),
}
LONG = [
    {"prompt": "Tom has 3 apples and buys 4 more at the market. " * 4, "completion": f"{count} " * count}
    for count in (3, 40, 900, 3000)
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("screens")
    folder = make_speaker("Qwen2.5", root / "model")
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config |= {"intermediate_size": 8, "vocab_size": 300, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, LONG)))
    return folder, root / "rows.jsonl"


def drawn(rows: list[Shown], columns: int) -> str:
    file = io.StringIO()
    terminal = Console(
        file=file, width=columns, force_terminal=True, color_system="standard", highlight=False
    )
    terminal.print(in_colour(rows))
    return file.getvalue()


@pytest.mark.parametrize("columns", [80, 120])
def test_rows_and_counts_fit_and_nothing_is_lost(columns: int, places: tuple[Path, Path]) -> None:
    folder, file = places
    rows = show_rows(file, folder, max_length=300)
    screen = shown(drawn(rows, columns).replace("\n", "\r\n"))
    assert max(map(len, screen)) <= columns
    words = " ".join(screen).split()
    for row in rows:
        for text, _ in row.pieces:
            assert [word for word in text.split() if word not in " ".join(words)] == []
    assert screen[-1] == "" or "read as context" in " ".join(screen[-3:])
    assert max(map(len, described(row_statistics(file, folder, max_length=300)))) <= 80


def test_what_is_learned_has_the_colour_its_end_token_too() -> None:
    row = Shown(0, [("<|user|>hi\n", "context"), ("yes<|end|>", "learned"), ("\nmore", "cut")], 9, 2)
    assert drawn([row], 80).startswith(
        "\x1b[1mrow 0: 9 tokens, 2 supervised\x1b[0m\n<|user|>hi\n\x1b[1;35myes<|end|>\x1b[0m"
    )
    assert "\x1b[2m⟨cut: \x1b[0m\n\x1b[2mmore⟩\x1b[0m" in drawn([row], 80)
    assert "<|user|>hi\n⟦yes<|end|>⟧⟨cut: \nmore⟩\n" in in_marks([row])
    assert "\x1b" not in drawn([Shown(0, [("\x1b[2Jgone", "learned")], 1, 1)], 80).replace(
        "\x1b[1", ""
    ).replace("\x1b[0m", ""), "a row cannot command the terminal"


def luminance(colour: tuple[int, int, int]) -> float:
    """As WCAG 2 defines it."""
    parts = [part / 255 for part in colour]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("palette", PALETTES)
def test_the_colour_is_legible_on_dark_and_on_light(palette: str) -> None:
    assert _STYLES["learned"] == "bold magenta"
    backgrounds = {"dark": [(0, 0, 0)], "light": [(255, 255, 255)]}
    for name, colours in backgrounds.items():
        if name not in palette and "VS Code" in palette:
            continue
        for ground in colours:
            for colour in PALETTES[palette]:
                light, dark = sorted((luminance(ground), luminance(colour)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) > 2.5, (name, colour)


def test_on_a_terminal(places: tuple[Path, Path]) -> None:
    folder, file = places
    command = [sys.executable, "-m", "mlx_adapters.cli.app", "data", "show", str(file)]
    command += ["--model", str(folder), "--rows", "1"]
    with Terminal(command, columns=80) as terminal:
        assert terminal.end() == 0, terminal.text
        assert "\x1b[1;35m3 3 3 <|im_end|>" in terminal.text
        screen = shown(terminal.text)
        terminal.close()
    assert max(map(len, screen)) <= 80
    assert "magenta is learned, ⟨cut: ⟩ is left out, the rest is read as context" in screen
