"""A hub that is down, slow, cuts files short or refuses: a local server that speaks its download protocol.

Every failure ends in one line that names the repository, with exit code 2; what works gives the same bytes.
The client reads its environment once, so each command is a process of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMITS, WEIGHTS, Hub
from tiny import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[Hub]:
    running = Hub(folder, tmp_path)
    yield running
    running.server.shutdown()
    running.server.server_close()


def same(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_a_download_then_offline_from_the_cache(hub: Hub) -> None:
    done = hub.convert("first")
    assert done.returncode == 0, done.stderr
    before = len(hub.kind.got)
    done = hub.convert("second", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(hub.kind.got) == before, "offline asks nobody"
    assert same(hub.root / "first", hub.root / "second")


def test_offline_without_a_cache(hub: Hub) -> None:
    assert "hub did not give it" in hub.fails(HF_HUB_OFFLINE="1")
    assert hub.kind.got == []


def test_a_hub_that_is_down(hub: Hub) -> None:
    assert "hub did not give it" in hub.fails(HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_a_hub_that_refuses(hub: Hub, status: int) -> None:
    hub.kind.api = status
    assert "hub did not give it" in hub.fails()


@pytest.mark.parametrize("status", [403, pytest.param(500, marks=pytest.mark.slow)])  # the client retries
def test_files_that_are_refused(hub: Hub, status: int) -> None:
    hub.kind.files = status
    assert "hub did not give it" in hub.fails()


@pytest.mark.slow
def test_a_slow_hub(hub: Hub) -> None:
    hub.kind.wait = 3
    assert "hub did not give it" in hub.fails()


def test_a_file_that_is_always_cut_short(hub: Hub) -> None:
    hub.kind.cut = 1000
    hub.fails()


def test_half_a_download_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    """The client keeps what came in steps of 10 MB, so the file has to be larger than two of them."""
    big = make_tiny("llama", tmp_path / "big", intermediate_size=60_000)
    size = (big / WEIGHTS).stat().st_size
    assert size > 25_000_000
    hub.kind.folder, hub.kind.cut = big, 1
    done = hub.convert("out")
    assert done.returncode == 0, done.stderr
    spans = [span for method, path, span in hub.kind.got if method == "GET" and WEIGHTS in path]
    starts = [int((span or "bytes=0-")[6:].split("-")[0]) for span in spans]
    assert starts[0] == 0
    assert any(0 < start <= size // 2 for start in starts), starts
    done = hub.convert("whole", HF_HOME=str(hub.root / "other"))
    assert same(hub.root / "out", hub.root / "whole")


def test_a_pinned_revision_is_the_one_asked_for(hub: Hub) -> None:
    done = hub.convert("out", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    loaded = [path for method, path, _ in hub.kind.got if method == "GET"]
    assert loaded
    assert all(f"/resolve/{COMMITS['v1']}/" in path for path in loaded)


def test_a_revision_that_is_not_there(hub: Hub) -> None:
    assert "hub did not give it" in hub.fails("--revision", "v9")
