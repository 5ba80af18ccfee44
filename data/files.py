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


def unfinished_path(path):
    """Where a file is written that is to become `path`: another each time, so that a process that was thought
    dead, and wakes up, takes nothing from the next."""
    return f"{path}.{os.urandom(4).hex()}.tmp"


def is_unfinished(name, names):
    """Whether a file of this name is what a kill left of one of `names`, by this or an older version."""
    return name.endswith(".tmp") and name.startswith(tuple(f"{own}." for own in names))


@contextlib.contextmanager
def atomic_file(path, backup_path=None):
    """A binary file, of unfinished_path(path), that becomes `path` when the block ends without an error.

    Until then, and after an error, `path` is what it was before. With `backup_path`, the old file is kept
    there; a kill between the two renames leaves only the backup. Raises OSError when it cannot be written.
    """
    temporary = unfinished_path(path)
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
