"""Hostile and broken files: nothing of them is executed, and each refusal says what was found."""

import builtins
import functools
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cim_core.errors import ModelError
from cim_core.tokenizers.inert_pickle import (
    MAX_OPERATIONS,
    Call,
    External,
    Instance,
    RefusedPickleError,
    Vocabulary,
    read_pickle,
)
from cim_core.tokenizers.official import CLASSES, read_official
from cim_core.tokenizers.torch_file import FUNCTIONS, MAGIC, PROTOCOL, open_torch_file

VOCABULARY = Vocabulary(classes=frozenset({"m.C"}), functions=frozenset({"m.f", "collections.OrderedDict"}))
CANARY = "canary"


class Wish:
    """Pickles as the call that it was given."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.wish = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.wish


def touch(path: Path) -> str:
    return f"touch {path}"


# What a hostile file might try, given the path of a file that must not appear.
ATTACKS: dict[str, Callable[[Path], Any]] = {
    "system": lambda path: Wish(os.system, touch(path)),
    "eval": lambda path: Wish(builtins.eval, f"__import__('os').system('{touch(path)}')"),
    "getattr": lambda path: Wish(builtins.getattr, Wish(builtins.__import__, "os"), "system"),
    "partial": lambda path: Wish(functools.partial, os.system, touch(path)),
    "torch.load": lambda path: Wish(torch.load, str(path), None),
    "nested": lambda path: Wish(
        torch.storage._load_from_bytes,  # type: ignore[attr-defined, unused-ignore]
        pickle.dumps(Wish(os.system, touch(path))),
    ),
    "in a state": lambda path: OrderedDict(state=[Wish(os.system, touch(path))]),
}
NAMES = {
    "system": "posix.system",
    "eval": "builtin",
    "getattr": "builtin",
    "partial": "functools.partial",
    "torch.load": "torch.serialization.load",
    "nested": "torch.storage._load_from_bytes",
    "in a state": "posix.system",
}


def test_attack__would_succeed_with_pythons_own_unpickler(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(ATTACKS["in a state"](tmp_path / CANARY)))
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_attack__is_refused_by_name_and_not_executed(
    tmp_path: Path, attack: str, protocol: int, *, zipped: bool
) -> None:
    path, wish = tmp_path / "encoder.pkl", ATTACKS[attack](tmp_path / CANARY)
    torch.save(wish, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    # The stream has small pickles of numbers in front, which protocols 0 and 4 up write otherwise.
    named = f"names '.*{NAMES[attack]}" if protocol in (2, 3) or zipped else "this is no|the pickle"
    with pytest.raises(ModelError, match=named) as caught:
        read_official(path, path)
    assert "nothing in it was executed" in str(caught.value)
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("module", ["os", "subprocess", "dall_e.encoder", "torch", "numpy"])
def test_names__a_known_module_does_not_make_another_name_known(module: str) -> None:
    with pytest.raises(RefusedPickleError, match=f"names '{module}.run'"):
        read("\x80\x02", f"c{module}\nrun\n.")


def test_names__are_refused_before_the_first_operation() -> None:
    """A bad name at the end refuses a pickle whose beginning is as broken as can be."""
    with pytest.raises(RefusedPickleError, match=r"names 'os\.system'"):
        read("\x80\x02", "00000cos\nsystem\n.")


def test_names__nothing_is_imported() -> None:
    """The classes need not exist: `m` is no module."""
    value = read("\x80\x02", "cm\nC\n)\x81}X\x01\x00\x00\x00aK\x07sb.")
    assert isinstance(value, Instance)
    assert (value.of, value.state) == ("m.C", {"a": 7})
    call = read("\x80\x02", "cm\nf\nK\x01\x85R.")
    assert isinstance(call, Call)
    assert (call.function, call.args) == ("m.f", (1,))
    external = read("\x80\x02", "K\x01K\x02\x86Q.")
    assert isinstance(external, External)
    assert external.parts == (1, 2)


@pytest.mark.parametrize(
    "value",
    [
        {
            "a": [1, -2, 3.5, None, True, False],
            "b": (),
            "c": (1,),
            "d": (1, 2),
            "e": (1, 2, 3),
            "f": (1, 2, 3, 4),
        },
        [256, 65536, 2**31 - 1, -(2**31), 2**80, "text\n\u00e9", {}, [[]], list(range(300))],
        OrderedDict(a=1, b=OrderedDict()),
    ],
)
def test_values__are_those_of_pythons_own_unpickler(value: Any) -> None:
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol=2)), VOCABULARY) == value


def test_values__that_occur_twice_are_one() -> None:
    shared: list[int] = []
    both = read_pickle(io.BytesIO(pickle.dumps([shared, shared], 2)), VOCABULARY)
    assert isinstance(both, list)
    assert both[0] is both[1]


def read(*parts: str) -> object:
    return read_pickle(io.BytesIO("".join(parts).encode("latin-1")), VOCABULARY)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("", "no whole pickle"),
        ("N", "no whole pickle"),
        ("not a pickle", "no whole pickle"),
        ("X\xff\xff\xff\x7fabc.", "no whole pickle"),  # claims two gigabytes of text
        ("\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "no whole pickle"),  # and eight exabytes of bytes
        (".", "does not end with one value"),
        ("NN.", "does not end with one value"),
        ("(N.", "does not end with one value"),
        ("N(.", "does not end with one value"),
        ("\x85.", "takes more from its stack"),
        ("N(\x85.", "takes more from its stack"),
        ("t.", "closes a list that it has not opened"),
        ("h\x05.", "asks for its value 5, which it has not kept"),
        ("NQ.", "NoneType where a tuple must stand"),
        ("NNR.", "NoneType where a tuple must stand"),
        ("N)R.", "uses NoneType as a function"),
        ("cm\nC\n)R.", r"uses m\.C as a function"),
        ("cm\nf\n)\x81.", r"uses m\.f as a class"),
        ("cm\nC\nN\x85\x81.", r"makes a m\.C with arguments"),
        ("cm\nC\n}b.", "gives attributes to Name"),  # a class itself is not to be changed
        ("cm\nC\n)\x81Nb.", "gives attributes to Instance"),
        ("cm\nC\n)\x81}b}b.", "gives attributes to Instance"),
        ("]NNs.", "puts keys into list"),
        ("}(Nu.", "puts keys into dict"),
        ("}NNs.", "a key that is no text but NoneType"),
        ("}Na.", "appends to dict"),
        ("U\x01a.", "the operation SHORT_BINSTRING, which torch.save does not write"),
        ("\x94.", "the operation MEMOIZE"),
        ("(i__main__\nA\n.", "names '__main__.A'"),
        ("cm\nf\n" + "N" * MAX_OPERATIONS + ".", f"more than {MAX_OPERATIONS} operations"),
    ],
)
def test_broken__is_refused_with_the_reason(program: str, words: str) -> None:
    with pytest.raises(RefusedPickleError, match=words):
        read(program)


def test_memo__a_far_place_costs_no_memory() -> None:
    """Python's own unpickler makes room for every place below."""
    assert read("Nr\xff\xff\xff\x7f.") is None


class Storage:
    """Stands for a storage of float32 numbers in a hand-made file."""

    def __init__(self, count: object, *, key: object = "0", kind: object = torch.FloatStorage) -> None:
        self.parts = "storage", kind, key, "cpu", count


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.parts if isinstance(value, Storage) else None


def parameter(storage: object, offset: object, size: object, stride: object) -> Wish:
    rest: tuple[object, ...] = (False, OrderedDict())  # needs no gradient, has no hooks
    rebuilt = Wish(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, *rest)
    return Wish(torch._utils._rebuild_parameter, rebuilt, *rest)


def archive(folder: Path, value: object, *, storage: bytes, **options: Any) -> Path:
    """A file in the zip format with one storage of the given bytes."""
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(value)
    path = folder / "a.pkl"
    with zipfile.ZipFile(path, "w", **options) as made:
        made.writestr("a/data.pkl", stream.getvalue())
        made.writestr("a/data/0", storage)
    return path


NINE = struct.pack("<9f", *range(9))


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (9,), (1,)), (1, (2, 4), (4, 1)), (0, (3, 3), (1, 3)), (8, (1,), (1,))]
)
def test_parameter__is_the_view_that_torch_would_make(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = archive(tmp_path, parameter(Storage(9), offset, size, stride), storage=NINE)
    with open_torch_file(path, classes=CLASSES) as file:
        tensor = file.parameter(file.root, size)
    assert torch.equal(tensor, torch.arange(9.0).as_strided(size, stride, offset))
    assert tensor.is_contiguous()


@pytest.mark.parametrize(
    ("storage", "offset", "size", "stride", "words"),
    [
        (Storage(2**50), 0, (2**50,), (1,), "claims 1125899906842624 numbers and holds 36 bytes"),
        (Storage(10), 0, (10,), (1,), "claims 10 numbers and holds 36 bytes"),
        (Storage(8), 0, (8,), (1,), "has 36 bytes, not 32"),
        (Storage(9), 0, (2**40,), (1,), "reaches to element 1099511627775 of a storage of 9"),
        (Storage(9), 0, (2**40,), (0,), "claims 1099511627776 numbers of a storage of 9"),
        (Storage(9), 1, (9,), (1,), "reaches to element 9 of a storage of 9"),
        (Storage(9), 0, (3, 3), (4, 1), "reaches to element 10 of a storage of 9"),
        (Storage(9), -1, (2,), (1,), "no counts"),
        (Storage(9), 0, (2,), (-1,), "no counts"),
        (Storage(9), 0, (2.0,), (1,), "no counts"),
        (Storage(9), 0, (1,), (2**70,), "no counts"),  # never stepped over, and beyond what torch can hold
        (Storage(9), 0, (9, 1), (1, 2**63), "no counts"),
        (Storage(2**70), 2**63, (1,), (1,), "no counts"),
        (Storage(9), 0, [9], (1,), "list where sizes must stand"),
        (Storage(9), 0, (9,), (1, 1), "not those of a tensor"),
        (Storage(9), 0, (0,), (1,), "not those of a tensor"),
        (Storage(9, key="../../etc/passwd"), 0, (9,), (1,), "lacks its part 'a/data/../../etc/passwd'"),
        (Storage(9, key=3), 0, (9,), (1,), "not one of float32 numbers"),
        (Storage("9"), 0, (9,), (1,), "not one of float32 numbers"),
        (Storage(9, kind="FloatStorage"), 0, (9,), (1,), "not one of float32 numbers"),
        (9, 0, (9,), (1,), "not one of float32 numbers"),
    ],
)
def test_parameter__what_its_storage_does_not_hold_is_refused(
    tmp_path: Path, storage: object, offset: object, size: Any, stride: object, words: str
) -> None:
    path = archive(tmp_path, parameter(storage, offset, size, stride), storage=NINE)
    refused(path, size, words)


def refused(path: Path, shape: tuple[int, ...], words: str) -> None:
    with (
        open_torch_file(path, classes=CLASSES) as file,
        pytest.raises(RefusedPickleError, match=words),
    ):
        file.parameter(file.root, shape)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (Wish(torch._utils._rebuild_parameter, 1), "no parameter but 1"),
        (Wish(torch._utils._rebuild_parameter), "no parameter but Call"),
        ([1], "no parameter but list"),
    ],
)
def test_parameter__what_is_none_is_refused(tmp_path: Path, saved: object, words: str) -> None:
    refused(archive(tmp_path, saved, storage=NINE), (9,), words)


def test_parameter__another_shape_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path, parameter(Storage(9), 0, (3, 3), (3, 1)), storage=NINE)
    refused(path, (9,), r"the shape \[3, 3\], not \[9\]")


def test_archive__a_compressed_file_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path, 1, storage=NINE, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(RefusedPickleError, match=r"'a/data.pkl' is compressed"):
        opened(path)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"a/version": b"3"}, r"holds one data\.pkl, this one 0"),
        ({"a/data.pkl": b"N.", "b/data.pkl": b"N."}, r"holds one data\.pkl, this one 2"),
        ({"a/data.pkl": b"N.", "a/byteorder": b"big"}, "big-endian"),
        ({"a/data.pkl": b"N" * ((16 << 20) + 1)}, "has 16777217 bytes, not 16777216"),
    ],
)
def test_archive__that_is_not_torchs_is_refused(tmp_path: Path, parts: dict[str, bytes], words: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.pkl", "w") as made:
        for name, content in parts.items():
            made.writestr(name, content)
    with pytest.raises(RefusedPickleError, match=words):
        opened(tmp_path / "a.pkl")


def stream(*values: object, tail: bytes = b"") -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in values) + tail


ENDIAN = {"little_endian": True}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>", "no whole pickle"),
        (stream(1), "no file of torch.save begins with 1"),
        (stream("a" * 500), r"begins with 'a{99}\.\.\."),
        (stream(MAGIC, 7), "of version 7, not 1001"),
        (stream(MAGIC, PROTOCOL, {"little_endian": False}), "not little-endian"),
        (stream(MAGIC, PROTOCOL, ENDIAN, 1, {}), "dict where its list of storages must stand"),
        (stream(MAGIC, PROTOCOL, ENDIAN, 1, ["0"], tail=struct.pack("<q", 3) + NINE[:11]), "is cut off"),
        (stream(MAGIC, PROTOCOL, ENDIAN, 1, ["0"], tail=b"\xff" * 8), "is cut off"),
        (stream(MAGIC, PROTOCOL, ENDIAN, 1, [0], tail=struct.pack("<q", 0)), "its storage 0"),
        (b"", "the file is empty"),
    ],
)
def test_stream__that_is_not_torchs_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(RefusedPickleError, match=words):
        opened(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("key", "count", "words"), [("1", 9, "lacks the storage '1'"), ("0", 8, "36 bytes, not 32")]
)
def test_stream__a_parameter_needs_its_storage(tmp_path: Path, key: str, count: int, words: str) -> None:
    written = io.BytesIO()
    Pickler(written, protocol=2).dump(parameter(Storage(count, key=key), 0, (count,), (1,)))
    head = stream(MAGIC, PROTOCOL, ENDIAN) + written.getvalue() + stream(["0"])
    (tmp_path / "a.pkl").write_bytes(head + struct.pack("<q", 9) + NINE)
    refused(tmp_path / "a.pkl", (count,), words)


def opened(path: Path) -> None:
    with open_torch_file(path, classes=CLASSES):
        raise AssertionError("the file was taken")


def test_functions__none_of_them_runs_foreign_code() -> None:
    """Listed by hand: a name that is added there deserves a second look."""
    harmless = {"collections.OrderedDict", "__builtin__.set", "builtins.set", "torch.device"}
    rebuilding = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"}
    assert harmless | rebuilding == FUNCTIONS
