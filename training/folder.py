"""The run directory as a place: a name of its own, one process that writes at a time, nobody else's files.

Imports no torch: sweeps lock their folders too.
"""

import contextlib
import json
import os
import socket
import time

from filelock import FileLock, SoftFileLock, Timeout

from configure import UserError

LOCK = "run.lock"  # held while a process writes to the folder; the system lets go of it when that dies
OWN_FILES = ("config.json", "table.txt", "tokenizer.json", "tokenizer_config.json", "metrics.csv",
             "tokenizer.tiktoken", "tokenizer.meta.json",  # of older versions
             "last.pt", "previous.pt", "best.pt", "stable.pt", "sample.txt")
UNFINISHED = tuple(f"{name}.tmp" for name in OWN_FILES)  # what a kill leaves of a file (data/files.py)


def claim_folder(name):
    """Makes a new folder: `name`, or the first of name-2, name-3, ... that does not exist. Of several
    processes that ask at once, each gets one of its own. Returns (its path, the folders made)."""
    made, number = make_folders(os.path.dirname(name)), 1
    path = name
    while True:
        try:
            os.mkdir(path)
        except FileExistsError:
            number += 1
            path = f"{name}-{number}"
        except OSError as error:
            raise cannot_write(path, error) from None
        else:
            return path, [*made, path]


def make_folders(path):
    """Makes the folder `path` and those above it that are missing. Returns the paths of those that it made,
    from the top. Raises UserError."""
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        for folder in reversed(missing):
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise cannot_write(missing[0], error) from None
    return missing[::-1]


def remove_empty(folders):
    """Removes those of `folders` that are empty, from the last to the first."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def cannot_write(path, error):
    return UserError(f"out: cannot write {path}: {error.strerror}")


@contextlib.contextmanager
def locked_folder(path):
    """Within, no other process has the folder `path`, which is made if need be, and removed again if nothing
    is put into it. Raises UserError where another has it (on NFS: where the server keeps flock's locks).
    """
    made = make_folders(path)
    lock_path = os.path.join(path, LOCK)
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"out: {path} is in use by {read_holder(lock_path)}; "
                        "takes another folder, or wait for its end") from None
    except OSError as error:
        remove_empty(made)
        raise cannot_write(path, error) from None
    try:
        write_holder(lock, lock_path)
        yield
    finally:
        # Removed while it is held: who opens the file before that finds that it has no name any longer
        if not isinstance(lock, SoftFileLock):
            with contextlib.suppress(OSError):
                os.remove(lock_path)
        lock.release()
        remove_empty(made)


def write_holder(lock, path):
    """Says in the lock file who holds it. Where a file system has no locks, the file itself is one, and
    filelock has written that."""
    if isinstance(lock, SoftFileLock):
        return
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError), open(path, "w") as file:  # a full disk is noticed by who needs it
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")


def read_holder(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return " ".join(file.read().split()) or "another process"
    except OSError:
        return "another process"


def check_is_ours(path):
    """Raises UserError where the folder `path` holds files, but no run: they are not this program's."""
    names = sorted(set(os.listdir(path)) - {LOCK, *UNFINISHED})
    if names and not is_run(path):
        raise UserError(f"out: {path} holds {names[0]} and no run; takes a new or empty folder, or a run")


def is_run(path):
    """Whether a run of this program lies in the folder `path`: by its settings or, should these be damaged,
    by the name of its checkpoint, which is read before anything is written."""
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            settings = json.load(file)
        if isinstance(settings, dict) and {"width", "depth", "lr", "steps", "out"} <= settings.keys():
            return True
    except (OSError, ValueError, RecursionError):
        pass
    return any(os.path.exists(os.path.join(path, name)) for name in ("last.pt", "previous.pt"))
