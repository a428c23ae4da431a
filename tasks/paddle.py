"""PaddlePaddle's .pdparams files, read without running anything that stands in them.

Such a file is a pickle of {name: NumPy array}, which needs six globals at most. The whole file is looked through first, and any
other global, or any other way to make an object, ends that. Then it is unpickled with harmless functions in their place.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from models.family import InputError

SUFFIX = ".pdparams"
LARGEST = 16 << 30  # bytes of a file
SPLIT, STRUCTURE = "UnpackBigParamInfor@@", "StructuredToParameterName@@"  # keys that are no tensors
STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING")
WAYS = ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID")  # other than by a global


class Refused(pickle.UnpicklingError):
    """The pickle holds something else than arrays."""


class _Array:
    """Stands for numpy.ndarray, which a pickle only names."""


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array, which the pickle's next instruction fills."""
    if kind is not _Array or shape != (0,):
        raise Refused("an array that is made in an unusual way")
    return np.empty(0, np.int8)


def _dtype(name: Any, *flags: Any) -> np.dtype[Any]:
    # The flags ask for a copy, whose byte order is still to come.
    made = np.dtype(name, *map(bool, flags)) if isinstance(name, str) else None
    if made is None or made.kind not in "biuf":
        raise Refused(f"an array of {name!r}, not of numbers")
    return made


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"text in {encoding!r}")
    return text.encode("latin1")


def _scalar(kind: np.dtype[Any], data: bytes) -> Any:
    return np.frombuffer(data, kind, 1)[0]


ALLOWED = {
    "numpy.core.multiarray _reconstruct": _reconstruct,
    "numpy._core.multiarray _reconstruct": _reconstruct,
    "numpy.core.multiarray scalar": _scalar,
    "numpy ndarray": _Array,
    "numpy dtype": _dtype,
    "_codecs encode": _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return ALLOWED.get(f"{module} {name}") or _refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        _refuse("an object of another file")


def _refuse(what: str) -> NoReturn:
    raise Refused(what)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names in Paddle. InputError for what is broken, too large, or more than numbers."""
    if path.stat().st_size > LARGEST:
        raise InputError(
            f"{path}: more than {LARGEST >> 30} GiB, refused; convert it to .safetensors where it is trusted"
        )
    try:
        with path.open("rb") as handle:
            for name in named_globals(handle):
                if name not in ALLOWED:
                    _refuse(name.replace(" ", "."))
            handle.seek(0)
            content = _Unpickler(handle, encoding="latin1").load()
    except Refused as error:
        raise InputError(f"{path}: holds more than arrays of numbers, refused: {error}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: broken or no file of weights ({reason}); bring it again") from None
    return {key: _tensor(value) for key, value in _arrays(path, content).items()}


def named_globals(handle: IO[bytes]) -> Iterator[str]:
    """Each global that a pickle names, "module name", found without running it; Refused for any other way to an object."""
    memo: dict[int, str | None] = {}
    last: list[str | None] = [None, None]  # what the two latest instructions have put on the stack, where that is text
    for opcode, argument, _ in pickletools.genops(handle):
        match opcode.name:
            case "MEMOIZE":
                memo[len(memo)] = last[-1]
                continue
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(argument)] = last[-1]  # pyright: ignore[reportArgumentType]
                continue
            case "GLOBAL":
                yield str(argument)
            case "STACK_GLOBAL":
                module, name = last
                yield f"{module} {name}" if module and name else "a global that the file does not name plainly"
            case way if way in WAYS:
                _refuse(f"an object by {way}")
        got = memo.get(int(argument)) if opcode.name in ("GET", "BINGET", "LONG_BINGET") else None  # pyright: ignore
        last = [last[-1], str(argument) if opcode.name in STRINGS else got]


def _arrays(path: Path, content: Any) -> dict[str, np.ndarray]:
    """The arrays by name, those in parts joined."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: a pickled {type(content).__name__}, not a mapping of names to arrays")
    split: Any = content.pop(SPLIT, {})
    content.pop(STRUCTURE, None)
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise InputError(f"{path}: {key!r} is a {type(value).__name__}; names of arrays are expected, nothing else")
    if not isinstance(split, Mapping):
        raise InputError(f"{path}: {SPLIT} is a {type(split).__name__}; bring the file again")
    for key, parts in split.items():
        try:
            joined = np.concatenate([content.pop(part).reshape(-1) for part in parts["slices"]])
            content[key] = joined.reshape(parts["OriginShape"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: the parts of {key!r} do not make it up ({error!r}); bring the file again"
            ) from None
    return content


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def class_names(file: Path) -> dict[str, Tensor]:
    """`labels`, the names of the classes as UTF-8 joined by line feeds, where one label*.txt lies beside the weights."""
    beside = sorted(file.parent.glob("label*.txt"))
    if len(beside) > 1:
        names = " and ".join(path.name for path in beside)
        raise InputError(f"{file}: {names} lie beside it; leave the one of these weights there")
    text = beside[0].read_text(encoding="utf-8").rstrip("\n") if beside else ""
    return {"labels": torch.tensor(list(text.encode()), dtype=torch.uint8)} if text else {}
