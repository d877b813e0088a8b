"""Files of `torch.save` that hold a whole module, read without torch's own unpickler.

Both formats are known: the zip archive (torch 1.6 and later) and the stream of pickles before it. The
tar archive of torch before 0.1.10 is not. Tensors are float32 alone, little-endian, and never larger
than the bytes that the file holds for them.
"""

import io
import math
import mmap
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cim_core.tokenizers.inert_pickle import (
    ORDERED_DICT,
    Call,
    External,
    Instance,
    Name,
    RefusedPickleError,
    Vocabulary,
    read_pickle,
    shown,
)

FLOATS, FLOAT_BYTES = "torch.FloatStorage", 4
PARAMETER, TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
COUNT_LIMIT = 2**63  # torch's integers
FUNCTIONS = frozenset({ORDERED_DICT, "__builtin__.set", "builtins.set", "torch.device", PARAMETER, TENSOR})

ZIP_START = b"PK\x03\x04"
MAX_PICKLE_BYTES = 16 << 20
ENCRYPTED = 1  # a flag of a zip entry

# Written in front of a stream of pickles; from torch/serialization.py.
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
COUNT_BYTES = 8  # before each storage


class TorchFile(ABC):
    """The value that was saved, and the tensors beside it."""

    root: object

    def parameter(self, saved: object, shape: Sequence[int]) -> Tensor:
        """The parameter that `saved` stands for, float32 on the CPU, in memory of its own.

        Raises:
            RefusedPickleError: it is no float32 parameter of that shape, or reaches beyond its storage.
        """
        storage, offset, sizes, strides = _view_of(saved)
        if list(sizes) != list(shape):
            raise RefusedPickleError(f"it has the shape {list(sizes)}, not {list(shape)}")
        key, count = _storage_of(storage)
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if last >= count:
            raise RefusedPickleError(f"it reaches to element {last} of a storage of {count}")
        if math.prod(sizes) > count:
            raise RefusedPickleError(f"it claims {math.prod(sizes)} numbers of a storage of {count}")
        data = self.storage(key, count * FLOAT_BYTES)
        if len(data) != count * FLOAT_BYTES:
            raise RefusedPickleError(f"its storage claims {count} numbers and holds {len(data)} bytes")
        flat = torch.from_numpy(np.frombuffer(data, dtype="<f4"))
        return flat.as_strided(sizes, strides, offset).contiguous()

    @abstractmethod
    def storage(self, key: str, num_bytes: int) -> bytearray:
        """The bytes of a storage, which claims to have `num_bytes`."""


@contextmanager
def open_torch_file(path: Path, *, classes: frozenset[str]) -> Iterator[TorchFile]:
    """What `torch.save` wrote to `path`; instances of `classes` are read as records.

    Raises:
        RefusedPickleError: here or at a tensor, the file holds something else or is cut off.
        OSError: the file cannot be read.
    """
    vocabulary = Vocabulary(classes=classes, functions=FUNCTIONS, values=frozenset({FLOATS}))
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
        if start == ZIP_START:
            with _whole():
                archive = zipfile.ZipFile(file)
            yield _Archive(archive, vocabulary)
        elif start:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield _Stream(content, vocabulary)
        else:
            raise RefusedPickleError("the file is empty")


@contextmanager
def _whole() -> Iterator[None]:
    """What zipfile raises at a damaged archive, as one error."""
    try:
        yield
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OverflowError) as error:
        raise RefusedPickleError(f"the file is cut off or damaged ({error})") from error


class _Archive(TorchFile):
    """The zip format: `NAME/data.pkl`, and a file `NAME/data/KEY` for each storage; none compressed."""

    def __init__(self, archive: zipfile.ZipFile, vocabulary: Vocabulary) -> None:
        self._archive = archive
        found = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise RefusedPickleError(f"a file of torch.save holds one data.pkl, this one {len(found)}")
        self._folder = found[0].removesuffix("data.pkl")
        order = f"{self._folder}byteorder"  # missing in older files, which are little-endian in practice
        if order in archive.namelist() and self._read(order, at_most=16) != b"little":
            raise RefusedPickleError("the numbers are big-endian")
        self.root = read_pickle(io.BytesIO(self._read(found[0], at_most=MAX_PICKLE_BYTES)), vocabulary)

    def storage(self, key: str, num_bytes: int) -> bytearray:
        return bytearray(self._read(f"{self._folder}data/{key}", at_most=num_bytes))

    def _read(self, name: str, *, at_most: int) -> bytes:
        try:
            entry = self._archive.getinfo(name)
        except KeyError:
            raise RefusedPickleError(f"the file lacks its part {shown(name)}") from None
        # A compressed entry could grow a thousandfold; torch writes none.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
            raise RefusedPickleError(f"the file's part {shown(name)} is compressed or encrypted")
        if entry.file_size > at_most:
            raise RefusedPickleError(
                f"the file's part {shown(name)} has {entry.file_size} bytes, not {at_most}"
            )
        with _whole():
            return self._archive.read(entry)


class _Stream(TorchFile):
    """The older format: magic number, version, machine, value, list of keys, then each storage's bytes."""

    def __init__(self, content: mmap.mmap, vocabulary: Vocabulary) -> None:
        self._content = content
        nothing = Vocabulary(classes=frozenset(), functions=frozenset())
        if (magic := self._value(nothing)) != MAGIC:
            raise RefusedPickleError(f"no file of torch.save begins with {shown(magic)}")
        if (version := self._value(nothing)) != PROTOCOL:
            raise RefusedPickleError(f"the file is of version {shown(version)}, not {PROTOCOL}")
        machine = self._value(nothing)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise RefusedPickleError("the numbers are not little-endian")
        self.root = self._value(vocabulary)
        self._places = dict(self._storages(self._value(nothing)))

    def storage(self, key: str, num_bytes: int) -> bytearray:
        if key not in self._places:
            raise RefusedPickleError(f"the file lacks the storage {shown(key)}")
        start, size = self._places[key]
        if size != num_bytes:
            raise RefusedPickleError(f"the storage {shown(key)} has {size} bytes, not {num_bytes}")
        return bytearray(self._content[start : start + size])

    def _value(self, vocabulary: Vocabulary) -> object:
        return read_pickle(self._content, vocabulary)

    def _storages(self, keys: object) -> Iterator[tuple[str, tuple[int, int]]]:
        """Each key with the place of its bytes and their number."""
        if not isinstance(keys, list):
            raise RefusedPickleError(f"the file has {shown(keys)} where its list of storages must stand")
        for key in keys:
            count = int.from_bytes(self._content.read(COUNT_BYTES), "little")
            start, size = self._content.tell(), count * FLOAT_BYTES
            if not isinstance(key, str) or start + size > len(self._content):
                raise RefusedPickleError(f"the file ends before its storage {shown(key)} does: it is cut off")
            yield key, (start, size)
            self._content.seek(start + size)


def attributes(module: object, path: str) -> Mapping[object, object]:
    """The attributes of a module that was saved.

    Raises:
        RefusedPickleError: it is no module with attributes.
    """
    if not isinstance(module, Instance) or module.state is None:
        raise RefusedPickleError(f"{path} is no module but {shown(module)}")
    return module.state


def _view_of(saved: object) -> tuple[object, int, tuple[int, ...], tuple[int, ...]]:
    """Storage, offset, sizes and strides of a parameter."""
    (tensor,) = _arguments(saved, PARAMETER, number=1)
    storage, offset, sizes, strides = _arguments(tensor, TENSOR, number=4)
    (start,) = _counts((offset,))
    view = storage, start, _counts(sizes), _counts(strides)
    if len(view[2]) != len(view[3]) or math.prod(view[2]) == 0:
        raise RefusedPickleError("its sizes and strides are not those of a tensor with elements")
    return view


def _arguments(value: object, function: str, *, number: int) -> tuple[object, ...]:
    """The first arguments of what must be a call of `function`."""
    if not isinstance(value, Call) or value.function != function or len(value.args) < number:
        raise RefusedPickleError(f"it is no parameter but {shown(value)}")
    return value.args[:number]


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise RefusedPickleError(f"it has {shown(values)} where sizes must stand")
    # A stride in a dimension of size 1 reaches nothing, so no bound of a storage catches it.
    counts = tuple(value for value in values if isinstance(value, int) and 0 <= value < COUNT_LIMIT)
    if len(counts) != len(values):
        raise RefusedPickleError("its offset, sizes or strides are no counts")
    return counts


def _storage_of(storage: object) -> tuple[str, int]:
    """Key and number of elements of a storage. The device that it was on does not matter."""
    if isinstance(storage, External):
        match storage.parts:
            # The older format has a sixth part, for storages that look into another one.
            case ("storage", Name(text="torch.FloatStorage"), str() as key, _, int() as count) | (
                "storage",
                Name(text="torch.FloatStorage"),
                str() as key,
                _,
                int() as count,
                None,
            ):
                return key, count
    raise RefusedPickleError("its storage is not one of float32 numbers")
