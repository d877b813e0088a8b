"""Texts that come from outside, as every file, terminal, database and JSON reader takes them."""


def printable(text: str) -> str:
    r"""`text` with what UTF-8 cannot carry as escapes, and U+FFFD in place of NUL; else as it is.

    A file name on Linux is any bytes; Python keeps those that are not UTF-8 as half characters, of which
    most writers die: `caf\udce9.jpg`, six characters for the byte E9, is what people and machines get to see.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\ufffd")
