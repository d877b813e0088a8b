"""A synchronous client of the service."""

from service.client.client import Client
from service.client.errors import ApiError, UnreachableError

__all__ = ["ApiError", "Client", "UnreachableError"]
