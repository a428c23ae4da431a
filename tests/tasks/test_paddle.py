"""Paddle's pickles of arrays: read as they were written, and refused before anything in them could run."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.family import InputError
from models.videotag.weights import class_names
from tasks import paddle, pretrained

RNG = np.random.default_rng(0)
ARRAYS = {
    "fc_0.w_0": RNG.standard_normal((7, 3)).astype(np.float32),
    "fc_0.b_0": RNG.standard_normal(3).astype(np.float64),
    "steps": np.array([1, -2], np.int64),
    "half": RNG.standard_normal((2, 2)).astype(np.float16),
    "fortran": np.asfortranarray(RNG.standard_normal((3, 4)).astype(np.float32)),
    "名": np.full((1, 1), 1.5, np.float32),
}


class Marker:
    """Unpickled as usual it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


def dump(folder: Path, content: Any, protocol: int = 2, old: bool = False) -> Path:
    path = folder / f"model{protocol}.pdparams"
    data = pickle.dumps(content, protocol)
    if old:  # as NumPy 1, with which Paddle wrote its files, names its module
        data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_come_back(tmp_path: Path, protocol: int) -> None:
    found = paddle.read(dump(tmp_path, ARRAYS, protocol))
    assert found.keys() == ARRAYS.keys()
    for name, tensor in found.items():
        assert np.array_equal(tensor.numpy(), ARRAYS[name]) and tensor.numpy().dtype == ARRAYS[name].dtype, name
        assert tensor.is_contiguous()


def test_numpy_1_files_and_big_endian(tmp_path: Path) -> None:
    found = paddle.read(dump(tmp_path, {"w": ARRAYS["fc_0.w_0"].astype(">f4")}, old=True))
    assert torch.equal(found["w"], torch.from_numpy(ARRAYS["fc_0.w_0"]))


def test_files_of_python_2(tmp_path: Path) -> None:
    """Names and bytes are both plain strings there."""
    values = struct.pack("<2f", 1.25, -200.5)
    text = b"U" + bytes([len(values)]) + values
    state = b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state + text + b"tb"
    path = tmp_path / "old.pdparams"
    path.write_bytes(b"\x80\x02}U\x01w" + array + b"s.")
    assert paddle.read(path)["w"].tolist() == [1.25, -200.5]


def test_large_arrays_in_parts_and_names_of_structures(tmp_path: Path) -> None:
    whole = ARRAYS["fc_0.w_0"]
    parts = {"w@@.0": whole.reshape(-1)[:10], "w@@.1": whole.reshape(-1)[10:], "b": ARRAYS["fc_0.b_0"]}
    info = {"w": {"OriginShape": (7, 3), "slices": ["w@@.0", "w@@.1"]}}
    content = parts | {paddle.SPLIT: info, paddle.STRUCTURE: {"fc.weight": "w"}}
    found = paddle.read(dump(tmp_path, content))
    assert found.keys() == {"w", "b"} and np.array_equal(found["w"].numpy(), whole)
    info["w"]["OriginShape"] = (7, 4)
    with pytest.raises(InputError, match="parts of 'w' do not make it up"):
        paddle.read(dump(tmp_path, content))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_any_other_global_is_refused_before_anything_runs(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    path = dump(tmp_path, {"a": Marker(marker), "w": ARRAYS["fc_0.w_0"]}, protocol)
    with pytest.raises(InputError, match=r"refused: posix\.mknod") as error:
        paddle.read(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the marker shows nothing"


def hidden_by_memo(marker: str) -> bytes:
    """Protocol 4: module and name of the function are taken from the memo, in the other order than they were put there."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    calls = b"h\x01h\x00\x93" + text(marker) + b"\x85R."
    return b"\x80\x04" + text("mknod") + b"\x940" + text("posix") + b"\x940" + calls


@pytest.mark.parametrize(
    "make",
    [
        hidden_by_memo,
        lambda marker: b"\x80\x02(S'" + marker.encode() + b"'\niposix\nmknod\n.",  # INST
        lambda marker: b"(cposix\nmknod\nX" + struct.pack("<I", len(marker)) + marker.encode() + b"o.",  # OBJ
        lambda marker: b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93)\x81.",  # NEWOBJ
        lambda marker: b"\x80\x02Pposix\n.",  # PERSID
        lambda marker: b"\x80\x04\x8c\x05posix0\x8c\x05posix\x8c\x04exec\x85\x93.",  # a global that is no plain text
    ],
    ids=["memo", "inst", "obj", "newobj", "persid", "unclear"],
)
def test_other_ways_are_refused(tmp_path: Path, make: Callable[[str], bytes]) -> None:
    marker, path = tmp_path / "marker", tmp_path / "odd.pdparams"
    path.write_bytes(make(str(marker)))
    with pytest.raises(InputError, match="refused"):
        paddle.read(path)
    assert not marker.exists()


def test_functions_that_are_allowed_do_only_what_arrays_need(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pdparams"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.")
    with pytest.raises(InputError, match="refused: text in 'zlib'"):
        paddle.read(path)
    path.write_bytes(b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.")  # an array of 2 GB out of nothing
    with pytest.raises(InputError, match="broken"):
        paddle.read(path)
    far = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R."
    path.write_bytes(b"\x80\x02" + far)
    with pytest.raises(InputError, match="refused: an array that is made in an unusual way"):
        paddle.read(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_no_dict_of_numbers(tmp_path: Path, protocol: int) -> None:
    for content, message in [
        ({"w": np.array([{}, 1], object)}, "refused: an array of 'O8'"),
        ({"w": np.array(["a"])}, "refused: an array of 'U1'"),
        ({"w": [1.0, 2.0]}, "'w' is a list"),
        ({3: ARRAYS["steps"]}, "3 is a ndarray"),
        ([ARRAYS["steps"]], "a pickled list"),
    ]:
        with pytest.raises(InputError, match=message):
            paddle.read(dump(tmp_path, content, protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_truncated_files(tmp_path: Path, protocol: int) -> None:
    path = dump(tmp_path, ARRAYS, protocol)
    data = path.read_bytes()
    for size in (0, 1, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="broken") as error:
            paddle.read(path)
        assert "\n" not in str(error.value)


def test_too_large_files_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle, "LARGEST", 100)
    with pytest.raises(InputError, match="refused"):
        paddle.read(dump(tmp_path, ARRAYS))


def test_a_label_file_beside_them_names_their_classes(tmp_path: Path) -> None:
    file = dump(tmp_path, ARRAYS)
    assert paddle.class_names(file) == {}
    (tmp_path / "label_2.txt").write_text("滑板\nswim ming\n\n", encoding="utf-8")
    state, _ = pretrained.load_state(str(file))
    assert class_names(state["labels"]) == {0: "滑板", 1: "swim ming"}
    (tmp_path / "label.txt").write_text("x\n")
    with pytest.raises(InputError, match=r"label\.txt and label_2\.txt .* leave the one of these weights"):
        pretrained.load_state(str(file))


def test_named_in_params_they_are_weights_like_others(tmp_path: Path) -> None:
    state, kind = pretrained.load_state(str(dump(tmp_path, ARRAYS)))
    assert np.array_equal(state["fc_0.w_0"].numpy(), ARRAYS["fc_0.w_0"])
    assert kind.startswith(str(tmp_path))
