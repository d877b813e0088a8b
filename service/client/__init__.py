"""A synchronous client of the service."""
