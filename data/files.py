"""Files that a kill, a crash or a full disk cannot leave half written. Imports only the standard library."""

import contextlib
import os


@contextlib.contextmanager
def durable_file(path):
    """A new binary file at `path` whose content is on the disk, not only in a cache, when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path, backup_path=None):
    """A binary file, written at `path`.tmp, that becomes `path` when the block ends without an error.

    Until then, and after an error, `path` is what it was before. With `backup_path`, the old file is kept
    there; a kill between the two renames leaves only the backup. Raises OSError when it cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        with durable_file(temporary) as file:
            yield file
        if backup_path and os.path.exists(path):
            os.replace(path, backup_path)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it may not exist, or the disk may have failed
            os.remove(temporary)
        raise


def write_text(path, text):
    """Make `path` hold `text` in UTF-8; after an error it holds what it held before. Raises OSError."""
    with atomic_file(path) as file:
        file.write(text.encode())
