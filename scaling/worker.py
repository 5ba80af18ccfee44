"""Processes and machines that share the trials of a folder: each trial is trained once.

A worker holds a lock for what it is training. The locks are byte ranges of one file, trials.lock (POSIX,
fcntl.lockf): the kernel drops them when their process ends, however it ends, so that a trial whose worker was
killed is free again at once. They work over machines where the file system has them, as NFS and Lustre do.
"""

import contextlib
import hashlib
import os
import signal
import threading
import time

from configure import stop_signals
from scaling.cli import make_folder

LOCK_FILE = "trials.lock"
MAX_WORKERS = 10_000  # each has a file of rows of its own, so that no two write into one line
PARENT = "SCALING_PARENT"  # the variable that tells a process started by another which one that was


class Worker:
    """One process among those that share the trials in `folder`; a context manager. `path` is the file that
    its rows go to. Raises UserError when the folder cannot be written."""

    def __init__(self, folder):
        make_folder(folder)
        self.folder, self.held = folder, set()

    def __enter__(self):
        self.file = open(os.path.join(self.folder, LOCK_FILE), "a+b")
        slot = next(slot for slot in range(MAX_WORKERS) if self._lock(slot))
        self.path = os.path.join(self.folder, f"trials-{slot}.csv" if slot > 0 else "trials.csv")
        return self

    def __exit__(self, *exception):
        self.file.close()  # and with it all locks

    def _lock(self, offset):
        import fcntl  # POSIX only, as locks of this kind are
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except (BlockingIOError, PermissionError):  # what a system raises for a lock that another holds
            return False
        return True

    def claim(self, key):
        """Whether nobody else holds `key`, any text: it is this worker's now."""
        if key in self.held or not self._lock(offset_of(key)):
            return False
        self.held.add(key)
        return True

    def release(self, key):
        import fcntl
        self.held.discard(key)
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, offset_of(key))

    @contextlib.contextmanager
    def holding(self, key):
        """Within, nobody else holds `key`: waits for it."""
        while not self.claim(key):
            pause()
        try:
            yield
        finally:
            self.release(key)

    def is_held(self, key):
        """Whether some living worker holds `key`, this one or another."""
        if key in self.held:
            return True
        if self.claim(key):
            self.release(key)
            return False
        return True


def offset_of(key):
    """The byte whose lock stands for `key`: beyond those of the workers' own files."""
    return MAX_WORKERS + int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def pause():
    """Between two looks at what others are training. Raises KeyboardInterrupt."""
    time.sleep(0.25)
    if stop_signals:  # again, where a library has caught it
        raise KeyboardInterrupt


def end_with_parent():
    """Ends this process, if another started it as its worker, when that other has ended, by SIGKILL too.
    Returns whether one did."""
    parent = os.environ.get(PARENT)

    def watch():
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
    return parent is not None
