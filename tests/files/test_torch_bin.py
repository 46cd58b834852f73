"""`.bin` checkpoints: equal to torch, and nothing a pickle asks for is ever run."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.errors import CheckpointError, UnsupportedError
from mlx_adapters.files.torch_bin import read_bin

torch = pytest.importorskip("torch", reason="the reference needs torch (extra: dev)")


def test_tensors_equal_torch(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {
        "plain": base,
        "tied": base,
        "transposed": base.T,
        "sliced": base[1:4, ::2],
        "half": torch.randn(4).half(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    torch.save(OrderedDict(state), tmp_path / "a.bin")
    found = read_bin(tmp_path / "a.bin")
    assert list(found) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(np.array(found[name]), tensor.detach().numpy(), strict=True)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5).bfloat16()
    torch.save({"a": tensor}, tmp_path / "a.bin")
    found = read_bin(tmp_path / "a.bin")["a"]
    assert found.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(found.astype(mx.float32)), tensor.float().numpy())


class Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def write(path: Path, content: Any) -> Path:
    stream = io.BytesIO()
    pickle.dump(content, stream, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
    return path


@pytest.mark.parametrize("function", [eval, exec, torch.load, torch.hub.load, Path.touch, getattr])
def test_no_function_of_a_pickle_runs(tmp_path: Path, function: Any) -> None:
    mark = tmp_path / "ran"
    arguments = (mark,) if function is Path.touch else (f"open({str(mark)!r}, 'w')",)
    file = write(tmp_path / "evil.bin", {"a": Call(function, *arguments)})
    with pytest.raises(CheckpointError, match=r"evil\.bin: refused, it asks for"):
        read_bin(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (3, 4), (4, 1)),
        (5, (2, 3), (3, 1)),
        (0, (100000, 100000), (0, 0)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
    ],
)
def test_a_tensor_cannot_reach_outside_its_storage(
    tmp_path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    storage = torch.zeros(10).untyped_storage()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 10) if value is storage else None

    stream = io.BytesIO()
    call = Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())
    Pickler(stream, protocol=2).dump({"a": call})
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/data/0", bytes(40))
    with pytest.raises(CheckpointError, match=r"a\.bin: refused"):
        read_bin(tmp_path / "a.bin")


def test_truncated_old_and_nested_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"a\.bin: is truncated"):
        read_bin(file)
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"1\.6"):
        read_bin(file)
    torch.save({"state_dict": {"a": torch.zeros(3)}}, file)
    with pytest.raises(CheckpointError, match="state_dict"):
        read_bin(file)
