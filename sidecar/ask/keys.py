"""What a terminal sends for keys, told apart.

Pure.
"""

import re
from typing import Final

_KEY: Final = re.compile(rb"\x1b[\[O][0-9;]*([A-Za-z~])|\x1b|[\x00-\x7f]|[\x80-\xff]+")

_SEQUENCES: Final = {b"A": "up", b"B": "down", b"C": "right", b"D": "left", b"Z": "backtab"}
_CONTROLS: Final = {
    b"\t": "tab",
    b"\x1b": "escape",
    b"\x04": "q",  # Ctrl-D
    b"j": "down",
    b"k": "up",
    b" ": "down",
}


def read_keys(data: bytes) -> list[str]:
    """The names of the keys pressed; what is none of ours is left out."""
    found = []
    for match in _KEY.finditer(data):
        key = match[0]
        if match[1] is not None:
            name = _SEQUENCES.get(match[1], "")
        elif key in _CONTROLS:
            name = _CONTROLS[key]
        else:
            name = key.decode("ascii", "replace").lower() if 0x20 < key[0] < 0x7F else ""
        if name:
            found.append(name)
    return found
