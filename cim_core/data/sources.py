"""Every file of a data set, before anyone has looked inside: folders, tar files, patterns of tar files."""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cim_core.data.unreadable import mendable, shortened, why
from cim_core.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
MOST_SHARDS = 100_000
_READABLE = "make it readable to the user that the workers run as"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is not used, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be an image."""

    path: str
    container: str | None
    offset: int
    size_bytes: int

    @property
    def name(self) -> str:
        """The path for people, container included."""
        return self.path if self.container is None else f"{self.container}/{self.path}"


@dataclass(frozen=True)
class Finding:
    """All that lies in a data set, ordered by container and path."""

    root: Path
    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]


def find(uri_path: str) -> Finding:
    """List the files below `uri_path` (see `cim_core.data.index.scan`) without reading images."""
    root, found = walk(uri_path)
    return _finding(root, found)


def walk(uri_path: str) -> tuple[Path, Iterator[Candidate | Skipped]]:
    """The root of `uri_path`, and its files as they are come upon: those of `find`, unordered.

    Raises DataError, also while the files are gone through, where something cannot be listed.
    """
    first, *rest = places(uri_path)
    if first.is_dir():
        return first, _in_folder(first)
    return _in_tars([first, *rest], given=uri_path)


def places(uri_path: str) -> list[Path]:
    """What `uri_path` stands for, links followed: one folder, or the files that it names. At least one."""
    if os.path.isdir(uri_path) or os.path.isfile(uri_path):
        return [_real(uri_path)]
    files = _matches(uri_path)
    if not files:
        shown = shortened(uri_path)
        raise DataError(f"data.uri: {shown} does not exist; give a folder, a .tar or a pattern of .tar files")
    return [_real(file) for file in files]


def _matches(uri_path: str) -> list[Path]:
    """The files that a pattern stands for, in order."""
    told = f"data.uri: {shortened(uri_path)}"
    try:
        with mendable(told, remedy=f"{_READABLE}, or correct the path"):
            return sorted({match for pattern in expand_braces(uri_path) for match in _glob(pattern)})
    except DataError:
        raise
    except (ValueError, NotImplementedError, RecursionError) as error:  # of pathlib, which follows patterns
        raise DataError(
            f"{told} is no pattern that can be followed ({error}); list the tars in braces"
        ) from error


def _real(path: str | Path) -> Path:
    """Links followed; unlike `Path.resolve` it takes a link that leads to itself as it is."""
    return Path(os.path.realpath(path))


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{0..2}.tar` and `{a,b}.tar` written out; numbers keep the width of the first.

    Raises DataError once it is clear that there are more than `MOST_SHARDS`.
    """
    left = MOST_SHARDS
    todo: list[Iterator[str]] = [iter([pattern])]
    while todo:
        one = next(todo[-1], None)
        if one is None:
            todo.pop()
        elif (match := _BRACES.search(one)) is not None:
            todo.append(_chosen(one, match))
        elif left:
            left -= 1
            yield one
        else:
            raise _too_many(pattern)


def _chosen(pattern: str, match: re.Match[str]) -> Iterator[str]:
    """`pattern` with each choice of its first braces."""
    choices: Iterable[str] = match[1].split(",")
    if ends := _NUMBERS.fullmatch(match[1]):
        first, last = int(ends[1]), int(ends[2])
        if last - first >= MOST_SHARDS:
            raise _too_many(pattern)
        choices = (str(number).zfill(len(ends[1])) for number in range(first, last + 1))
    return (pattern[: match.start()] + choice + pattern[match.end() :] for choice in choices)


def _too_many(pattern: str) -> DataError:
    return DataError(f"data.uri: a pattern may stand for at most {MOST_SHARDS} shards, got {pattern}")


def _glob(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    parts = path.parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    if fixed == len(parts):
        return iter([path] if path.is_file() else [])
    folder = Path(*parts[:fixed])
    try:
        os.scandir(folder).close()  # pathlib finds nothing, and says nothing, where it may not look
    except (FileNotFoundError, NotADirectoryError):
        return iter([])
    return (p for p in folder.glob(str(Path(*parts[fixed:]))) if p.is_file())


def _in_tars(tars: list[Path], *, given: str) -> tuple[Path, Iterator[Candidate | Skipped]]:
    not_tars = [str(path) for path in tars if not _is_tar(path)]
    if not_tars:
        raise DataError(
            f"data.uri: {not_tars[0]} (from {given}) is not an uncompressed tar file; give a folder, a .tar"
            " or a pattern of .tar files (a compressed archive has to be unpacked first)"
        )
    root = Path(os.path.commonpath([path.parent for path in tars]))
    return root, (item for path in tars for item in _in_tar(path, path.relative_to(root).as_posix()))


def _is_tar(path: Path) -> bool:
    try:
        with mendable(f"data.uri: {shortened(path)}", remedy=_READABLE), tarfile.open(path, "r:"):
            return True
    except (DataError, OSError):
        raise
    except Exception:  # of a damaged archive tarfile raises more than its own classes
        return False


def _finding(root: Path, found: Iterable[Candidate | Skipped]) -> Finding:
    items = list(found)
    candidates = [item for item in items if isinstance(item, Candidate)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    candidates.sort(key=lambda c: (c.container or "", c.path))
    return Finding(root, tuple(candidates), tuple(skipped))


def _in_folder(root: Path) -> Iterator[Candidate | Skipped]:
    """Files below `root`; hidden files and folders are not even counted."""
    todo = [root]
    while todo:
        for entry in _listed(todo.pop()):
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if not _is_folder(entry):
                yield from _one_file(root, path)
            elif entry.is_symlink():
                yield Skipped(path.relative_to(root).as_posix(), "link to a folder")
            else:
                todo.append(path)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    told = f"data.uri: the folder {shortened(folder)}"
    with mendable(told, remedy=f"{_READABLE}, or move it elsewhere"), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def _one_file(root: Path, file: Path) -> Iterator[Candidate | Skipped]:
    path = file.relative_to(root).as_posix()
    if os.path.islink(file) and not _real(file).is_relative_to(root):
        yield Skipped(path, "link that leaves the folder")
        return
    try:
        size_bytes = file.stat().st_size if file.is_file() else None
    except OSError as error:
        yield Skipped(path, f"cannot be read: {why(error)}")
        return
    if size_bytes is None:
        yield Skipped(path, "broken link or not a regular file")
    elif file.suffix.lower() == ".tar":
        yield from _in_tar(file, path)
    else:
        yield Candidate(path, None, 0, size_bytes)


def _in_tar(file: Path, container: str) -> Iterator[Candidate | Skipped]:
    """Regular files of a tar; of two members with one name the later counts, as when unpacking."""
    members: dict[str, Candidate] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in _members(tar):
                path = member.name.removeprefix("./").lstrip("/")
                if member.isdir() or _hidden(path):
                    continue
                if not member.isreg() or member.issparse():
                    yield Skipped(f"{container}/{path}", "link, device or sparse file inside a tar")
                    continue
                if path in members:
                    yield Skipped(f"{container}/{path}", "replaced by a later member of the same name")
                members[path] = Candidate(path, container, member.offset_data, member.size)
    except Exception as error:  # whatever a damaged archive makes its parser raise is the reason we report
        told = why(error) if isinstance(error, OSError) else error or type(error).__name__
        yield Skipped(container, f"the tar file cannot be read to its end: {told}")
    yield from members.values()


def _hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers one by one, forgetting each: a million of them are a gigabyte."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        yield member
    # A damaged header looks to tarfile like the end; the true end is a block of zeros, or nothing.
    assert tar.fileobj is not None, "open for reading"
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
