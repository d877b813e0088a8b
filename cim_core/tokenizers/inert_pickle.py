"""Read a pickle as plain data: names stay text and calls stay records; nothing is imported or run.

A pickle is a program for a small stack machine. This machine knows only the operations that
`torch.save` writes (pickle protocol 2), and none of them calls anything: where Python's own would
call a function or make an instance, a record of the wish is left. The whole program is looked
through before its first operation, so a name that is not expected refuses the file as a whole.
"""

import mmap
import pickletools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import IO, Any, cast

MAX_OPERATIONS = 500_000  # the official files have some ten thousand
MAX_SHOWN = 100  # characters of a foreign text in a message

# A mapped file reads like any other and never hands out more than it has, whatever is asked for.
Stream = IO[bytes] | mmap.mmap

ORDERED_DICT = "collections.OrderedDict"


class RefusedPickleError(ValueError):
    """The pickle holds what is not expected, or is no pickle; nothing of it was executed."""


@dataclass(frozen=True, slots=True)
class Name:
    """A global of the pickle, `module.name`, that was never looked up."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call that was never made."""

    function: str
    args: tuple[object, ...]


@dataclass(slots=True, eq=False)
class Instance:
    """An object that was never made: its class by name, and its attributes."""

    of: str
    state: Mapping[object, object] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class External:
    """Something beside the pickle, such as a tensor's storage."""

    parts: tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The names a pickle may hold, each as `module.name`."""

    classes: frozenset[str]  # whose instances are read, without constructor arguments
    functions: frozenset[str]
    values: frozenset[str] = frozenset()  # that stand for themselves

    def __contains__(self, name: str) -> bool:
        return name in self.classes or name in self.functions or name in self.values


def read_pickle(stream: Stream, vocabulary: Vocabulary) -> object:
    """The one value of the pickle at `stream`, which is left behind its end.

    Dictionaries and ordered ones become `dict`; names, calls, instances and external parts become
    the records above.

    Raises:
        RefusedPickleError: a name outside `vocabulary`, another operation than protocol 2 needs, or a
            broken pickle.
    """
    program = _program(stream, vocabulary)
    machine = _Machine(vocabulary=vocabulary)
    for operation, argument in program:
        _OPERATIONS[operation](machine, argument)
    if len(machine.stack) != 1 or machine.marks:
        raise RefusedPickleError("the pickle does not end with one value")
    return machine.stack.pop()


def shown(foreign: object) -> str:
    """A foreign text or number for a message, cut short; of anything else only its kind."""
    if not isinstance(foreign, str | int | float):
        return type(foreign).__name__
    text = repr(foreign)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _program(stream: Stream, vocabulary: Vocabulary) -> list[tuple[str, Any]]:
    """Every operation up to the end, all of them known and all of their names allowed."""
    try:
        read = islice(pickletools.genops(cast(IO[bytes], stream)), MAX_OPERATIONS)
        found = [(code.name, value) for code, value, _ in read]
    except (ValueError, OverflowError, MemoryError) as error:
        raise RefusedPickleError(f"this is no whole pickle ({shown(str(error))})") from None
    # Names first: what a hostile file wants to call says more than how it was written.
    for name in _names(found):
        if name not in vocabulary:
            raise RefusedPickleError(f"the pickle names {shown(name)}")
    for operation, _ in found:
        if operation not in _OPERATIONS:
            raise RefusedPickleError(
                f"the pickle holds the operation {operation}, which torch.save does not write"
            )
    if not found or found[-1][0] != "STOP":
        raise RefusedPickleError(f"the pickle has more than {MAX_OPERATIONS} operations")
    return found


def _names(program: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Every global of a program. Newer protocols take its parts from the stack: the last texts, mostly."""
    texts: list[str] = []
    for operation, value in program:
        if operation in ("GLOBAL", "INST"):
            yield _name_of(value)
        elif operation == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif isinstance(value, str):
            texts.append(value)


def _name_of(value: str) -> str:
    return value.replace(" ", ".", 1)


@dataclass
class _Machine:
    vocabulary: Vocabulary
    stack: list[object] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  # heights of the stack
    memo: dict[int, object] = field(default_factory=dict)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise RefusedPickleError("the pickle takes more from its stack than it has put there")
        return self.stack.pop()

    def pop_to_mark(self) -> list[object]:
        if not self.marks:
            raise RefusedPickleError("the pickle closes a list that it has not opened")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def top(self) -> object:
        value = self.pop()
        self.stack.append(value)
        return value

    def put(self, place: int) -> None:
        self.memo[place] = self.top()

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise RefusedPickleError(f"the pickle asks for its value {place}, which it has not kept")
        self.push(self.memo[place])

    def name(self, value: str) -> None:
        self.push(Name(_name_of(value)))

    def external(self, _: object) -> None:
        match self.pop_tuple():
            case ("module", Name() as name, *_):
                self.push(name)  # the older format hands a class over together with its source
            case parts:
                self.push(External(parts))

    def tuple_of(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    def tuple_from_mark(self, _: object) -> None:
        self.push(tuple(self.pop_to_mark()))

    def pop_tuple(self) -> tuple[object, ...]:
        value = self.pop()
        if not isinstance(value, tuple):
            raise RefusedPickleError(f"the pickle has {shown(value)} where a tuple must stand")
        return value

    def pop_name(self, allowed: frozenset[str], what: str) -> str:
        value = self.pop()
        if not isinstance(value, Name) or value.text not in allowed:
            got = value.text if isinstance(value, Name) else shown(value)
            raise RefusedPickleError(f"the pickle uses {got} as a {what}")
        return value.text

    def call(self, _: object) -> None:
        args = self.pop_tuple()
        function = self.pop_name(self.vocabulary.functions, "function")
        empty = function == ORDERED_DICT and not args
        self.push({} if empty else Call(function, args))

    def instance(self, _: object) -> None:
        args = self.pop_tuple()
        of = self.pop_name(self.vocabulary.classes, "class")
        if args:
            raise RefusedPickleError(f"the pickle makes a {of} with arguments, which no module is")
        self.push(Instance(of))

    def build(self, _: object) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Instance) or target.state is not None or not isinstance(state, dict):
            raise RefusedPickleError(f"the pickle gives attributes to {shown(target)}")
        target.state = state

    def set_item(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self.fill([key, value])

    def set_items(self, _: object) -> None:
        self.fill(self.pop_to_mark())

    def fill(self, pairs: list[object]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise RefusedPickleError(f"the pickle puts keys into {shown(target)}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise RefusedPickleError(f"the pickle has a key that is no text but {shown(key)}")
            target[key] = value

    def append(self, _: object) -> None:
        self.extend([self.pop()])

    def append_all(self, _: object) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise RefusedPickleError(f"the pickle appends to {shown(target)}")
        target.extend(values)


def _constant(make: Callable[[], object]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _nothing(machine: _Machine, argument: Any) -> None:
    """The pickle's frame: its protocol and its end."""


_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = MappingProxyType(
    {
        "PROTO": _nothing,
        "STOP": _nothing,
        "NONE": _constant(lambda: None),
        "NEWTRUE": _constant(lambda: True),
        "NEWFALSE": _constant(lambda: False),
        "EMPTY_DICT": _constant(dict),
        "EMPTY_LIST": _constant(list),
        "EMPTY_TUPLE": _constant(tuple),
        **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
        **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
        **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
        "MARK": _Machine.mark,
        "TUPLE": _Machine.tuple_from_mark,
        "TUPLE1": lambda machine, _: machine.tuple_of(1),
        "TUPLE2": lambda machine, _: machine.tuple_of(2),
        "TUPLE3": lambda machine, _: machine.tuple_of(3),
        "GLOBAL": _Machine.name,
        "BINPERSID": _Machine.external,
        "REDUCE": _Machine.call,
        "NEWOBJ": _Machine.instance,
        "BUILD": _Machine.build,
        "SETITEM": _Machine.set_item,
        "SETITEMS": _Machine.set_items,
        "APPEND": _Machine.append,
        "APPENDS": _Machine.append_all,
    }
)
