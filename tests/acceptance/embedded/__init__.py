"""Starting, killing and asking a real embedded service."""

from tests.acceptance.embedded import specs
from tests.acceptance.embedded.service import Embedded

__all__ = ["Embedded", "specs"]
