"""`source: dall-e`: OpenAI's files, fetched and converted once, then kept in the service's object store.

A converted tokenizer lies at a key that is a function of both files' SHA-256, and what an address
held when it was first fetched is noted beside it. So a second job downloads nothing, and two jobs
that meet write the same bytes to the same place. `config.json` is written last: what has one is whole.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cim_core.config import TokenizerSource
from cim_core.data.unreadable import mendable, shortened
from cim_core.errors import DataError
from cim_core.tokenizers.official import read_official, sha256_of
from cim_core.tokenizers.store import RECORD, TENSORS, save_tokenizer
from service.contracts.allowed import DALL_E_FILES, Allowed
from service.contracts.work import StoreAddress
from service.store.base import MissingObjectError, ObjectStore
from service.store.open import open_store
from workers.allowed import check_address, check_places
from workers.cache import locked
from workers.downloads import download, shown
from workers.storage import patiently

log = logging.getLogger(__name__)

PREFIX = "tokenizers/dall-e"
WEB = ("http://", "https://")
MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Half:
    """One of the two files: where it is, and what it has to be."""

    name: str  # encoder | decoder
    address: str
    wanted: str | None  # SHA-256

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return "://" not in self.address

    @property
    def note(self) -> str:
        """Key of what is known of the address."""
        return f"{PREFIX}/sources/{hashlib.sha256(self.address.encode()).hexdigest()}.json"


@dataclass(frozen=True, kw_only=True)
class OfficialTokenizer:
    """One job's way to the tokenizer."""

    source: TokenizerSource
    store: ObjectStore
    address: StoreAddress  # `s3://` sources are read with its endpoint and region
    allowed: Allowed  # where addresses may lead
    folder: Path  # for downloads on this node
    say: Callable[[str], None]
    go_on: Callable[[], None]  # raises when the job is to end

    def place(self) -> str:
        """Key prefix of the tokenizer's folder in the object store, put there where it is missing.

        Raises:
            DataError: a file is not there, or is not the one that the spec wants.
            ModelError: a file is not what OpenAI published; nothing in it was executed.
            SourceAwayError: an address did not answer for all tries.
            StoreError: the store stayed away.
        """
        if (kept := self._kept()) is not None:
            return kept
        with locked(self.folder / "dall-e"):
            # Another process of this job may have been faster.
            return self._kept() or self._made()

    def _kept(self) -> str | None:
        """The place, where it takes no download to know it and something is there."""
        halves = self._halves()
        known = [digest for half in halves if (digest := self._known(half)) is not None]
        place = _place_of(known)
        if len(known) < len(halves) or not self._has(place):
            return None
        log.info("the DALL-E tokenizer is in the object store: %s", _told(halves, known))
        return place

    def _made(self) -> str:
        halves = self._halves()
        files = [self._file(half) for half in halves]
        digests = [_checked(half, file) for half, file in zip(halves, files, strict=True)]
        log.info("the DALL-E tokenizer: %s", _told(halves, digests))
        place = _place_of(digests)
        if not self._has(place):
            self._convert(*files, place=place)
        for half, file, digest in zip(halves, files, digests, strict=True):
            self._remember(half, file, digest)
        return place

    def _halves(self) -> tuple[Half, Half]:
        given = self.source
        encoder, decoder = (
            given.encoder or f"{DALL_E_FILES}/encoder.pkl",
            given.decoder or f"{DALL_E_FILES}/decoder.pkl",
        )
        return (
            Half(name="encoder", address=encoder, wanted=given.encoder_sha256),
            Half(name="decoder", address=decoder, wanted=given.decoder_sha256),
        )

    def _known(self, half: Half) -> str | None:
        """The file's SHA-256 where it takes no download to know it."""
        if half.is_local:
            return _checked(half, self._file(half))
        return half.wanted or self._noted(half)

    def _noted(self, half: Half) -> str | None:
        try:
            note = patiently(lambda: self.store.get_bytes(half.note), what=f"reading {half.note}")
        except MissingObjectError:
            return None
        return str(json.loads(note)["sha256"])

    def _has(self, place: str) -> bool:
        key = f"{place}/{RECORD}"
        return patiently(lambda: self.store.stat(key), what=f"looking for {key}") is not None

    def _file(self, half: Half) -> Path:
        """The file on this node."""
        check_address(half.address, self.allowed)
        if half.is_local:
            path = Path(half.address)
            check_places([path], self.allowed, given=half.address)
            told = f"model.tokenizer.{half.name}: {shortened(path)}"
            if not os.path.isfile(path):
                raise DataError(
                    f"{told} is no file on the worker's node: give one that every node sees, or an http(s)://"
                    " or s3:// address"
                )
            with mendable(told, remedy="make it readable to the user that the workers run as"):
                path.open("rb").close()
            return path
        target = self.folder / "dall-e" / f"{half.name}.pkl"
        if half.address.startswith(WEB):
            download(
                half.address,
                target,
                on_bytes=lambda done, total: self._show(half, done, total),
                may_fetch=lambda address: check_address(address, self.allowed),
            )
        else:
            self._from_s3(half, target)
        return target

    def _show(self, half: Half, done: int, total: int | None) -> None:
        self.go_on()
        of = f" of {total // MB}" if total else ""
        self.say(f"fetching {half.name}.pkl: {done // MB}{of} MB")

    def _from_s3(self, half: Half, target: Path) -> None:
        self.say(f"fetching {half.name}.pkl")
        folder, _, name = half.address.rpartition("/")
        store = open_store(folder, endpoint_url=self.address.endpoint_url, region=self.address.region)
        try:
            patiently(lambda: store.get_file(name, target), what=f"reading {half.address}")
        except MissingObjectError as error:
            raise DataError(
                f"model.tokenizer.{half.name}: nothing is stored at {half.address}: check the address"
            ) from error

    def _convert(self, encoder: Path, decoder: Path, *, place: str) -> None:
        self.go_on()
        self.say("converting the DALL-E tokenizer")
        model = read_official(encoder, decoder)
        with tempfile.TemporaryDirectory(prefix="cim-dall-e-") as made:
            save_tokenizer(model, Path(made))
            for name in (TENSORS, RECORD):
                file, key = Path(made, name), f"{place}/{name}"
                patiently(partial(self.store.put_file, key, file), what=f"writing {key}")

    def _remember(self, half: Half, file: Path, digest: str) -> None:
        """Note what the address held, and free the disk."""
        if half.is_local:
            return
        note = {"address": shown(half.address), "sha256": digest, "size": file.stat().st_size}
        content = json.dumps(note, indent=1).encode()
        patiently(lambda: self.store.put_bytes(half.note, content), what=f"writing {half.note}")
        file.unlink()


def _place_of(digests: Sequence[str]) -> str:
    return f"{PREFIX}/{hashlib.sha256(''.join(digests).encode()).hexdigest()}"


def _checked(half: Half, file: Path) -> str:
    """The file's SHA-256, which is the wanted one if there is such."""
    digest = sha256_of(file)
    if half.wanted not in (None, digest):
        raise DataError(
            f"model.tokenizer.{half.name}_sha256: the file of {_shown(half)} has the SHA-256 {digest}, and "
            f"the spec wants {half.wanted}: correct the one that is wrong"
        )
    return digest


def _shown(half: Half) -> str:
    return half.address if half.is_local else shown(half.address)


def _told(halves: tuple[Half, Half], digests: Sequence[str]) -> str:
    return ", ".join(f"{_shown(half)} sha256 {digest}" for half, digest in zip(halves, digests, strict=True))
