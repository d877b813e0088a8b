"""Names of this machine that no other machine reaches. Until there are users, the api has no other."""

NAMES = ("127.0.0.1", "::1", "localhost")


def fault(host: str) -> str:
    """Why the api must not listen there; empty where it may."""
    if host in NAMES:
        return ""
    return (
        f"must be {', '.join(NAMES[:-1])} or {NAMES[-1]}, got {host!r}: there are no users yet, so "
        "whoever reaches the api may run jobs and read files. To reach it from elsewhere, put a proxy that "
        "authenticates people in front of it, or use a tunnel: ssh -L 8000:127.0.0.1:8000 THIS-MACHINE"
    )
