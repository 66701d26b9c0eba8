"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file through a temporary one beside it, so that a crash leaves the old file or the new one.

    Text is written as UTF-8. Raises `OSError` if it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(path).resolve()
    if target.exists() and not target.is_file():  # a pipe or a device
        target.write_bytes(data)
        return
    fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp made it private
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
