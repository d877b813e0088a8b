"""The `cim` command: the service from a terminal. Knows only the contracts and the client."""
