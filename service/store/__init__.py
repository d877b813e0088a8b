"""The object store: a directory or an S3 bucket behind one interface."""

from service.store.base import (
    CorruptObjectError,
    Entry,
    InvalidKeyError,
    MissingObjectError,
    ObjectStore,
    StoreError,
    StoreFullError,
    Upload,
)
from service.store.open import open_store

__all__ = [
    "CorruptObjectError",
    "Entry",
    "InvalidKeyError",
    "MissingObjectError",
    "ObjectStore",
    "StoreError",
    "StoreFullError",
    "Upload",
    "open_store",
]
