"""The allow-list of storage once more, where the files can be seen: links may lead out of a folder."""

from collections.abc import Iterable
from pathlib import Path

from cim_core.errors import DataError
from service.contracts.addresses import redacted
from service.contracts.allowed import Allowed
from service.store.links import leads_out


def check_address(address: str, allowed: Allowed) -> None:
    """Raise `DataError` for an address that this service does not allow."""
    if fault := allowed.fault(address):
        raise DataError(f"an address {fault}, got {redacted(address)}")


def check_places(paths: Iterable[Path], allowed: Allowed, *, given: str) -> None:
    """Raise `DataError` where one of the places that `given` stands for leads out of the allowed folders."""
    if allowed.anywhere_local:
        return
    if strays := [path for path in paths if leads_out(path, allowed.folders)]:
        raise DataError(
            f"{given} leads through a link out of the places that this service allows"
            f"{f' ({len(strays)} files)' if len(strays) > 1 else ''}: copy the files there instead"
        )
