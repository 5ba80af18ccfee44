"""The run directory: claims and locks it, chooses the checkpoint to resume from, writes what belongs there.

config.json   the settings; RUN_DIR on the command line stands for this file
table.txt     the resolved parametrization
tokenizer.*   the tokenizer, so that the folder is all that it takes to use the model
metrics.csv   a row per optimizer step, rewritten from the checkpoint when the run resumes (training/log.py)
loss.png      a picture of it (training/loss_plot.py)
last.pt       the newest checkpoint; previous.pt the one before it, in case last.pt is damaged
best.pt       the checkpoint of the lowest validation loss; what that loss is stands in it alone
stable.pt     of a schedule with a stable phase, the checkpoint before the decay: used to extend the run
sample.txt    what the trained model writes
wandb_id.txt  with --wandb=true, the id of the run there, which a resumed run continues
run.lock      who writes here, while a process does
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, replace

from filelock import FileLock, SoftFileLock, Timeout

from configure import UserError
from data.files import atomic_file, is_unfinished
from data.tokenizer import keep_tokenizer
from training.checkpoint import (
    DamagedCheckpoint,
    check_same_settings,
    check_same_tokens,
    checkpoint_content,
    load_state,
    load_weights,
    read_checkpoint,
    read_newest,
    settings_of_checkpoint,
    write_checkpoint,
)
from training.distributed import rank
from training.schedule import decay_start

LOCK = "run.lock"  # the operating system releases it when the process dies
OWN_FILES = ("config.json", "table.txt", "tokenizer.json", "tokenizer_config.json", "metrics.csv",
             "tokenizer.tiktoken", "tokenizer.meta.json",  # of older versions
             "last.pt", "previous.pt", "best.pt", "stable.pt", "sample.txt", "wandb_id.txt", "loss.png")


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


def unfinished_steps(path):
    """The steps of the run in the folder `path`, if it ended before its last one and can be resumed; None for
    any other folder: of a run that is finished (it has a sample), diverged or still runs."""
    try:
        present = {*os.listdir(path)}
        if "last.pt" not in present or "sample.txt" in present or is_in_use(path):
            return None
        with open(os.path.join(path, "metrics.csv"), encoding="utf-8", errors="replace") as file:
            rows = [line.split(",") for line in file.read().splitlines()]
    except OSError:  # no run, or somebody else's
        return None
    if rows and {"nan", "inf", "-inf"} & {*rows[-1]}:  # it diverged
        return None
    return max((int(step) for step, *_ in rows if step.isdecimal()), default=0)


def is_in_use(path):
    """Whether a process holds the folder `path`; one that was killed leaves the file of its lock behind."""
    if not os.path.exists(os.path.join(path, LOCK)):
        return False
    try:
        with locked_folder(path):
            return False
    except UserError:
        return True


def make_folders(path):
    """Makes the folder `path` and those above it; returns those it made, from the top. Raises UserError."""
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
    """Within, no other process writes to the folder `path`, which is made if need be, and removed again if
    it stays empty. Yields check_held(), to be called before each write: it raises UserError when the folder
    is no longer this process's. Raises UserError if another process holds the folder (on NFS: if the server
    keeps flock's locks)."""
    made = make_folders(path)
    lock_path = os.path.join(path, LOCK)
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"out: {path} is in use by {read_holder(lock_path)}; try another folder, or wait "
                        "until it ends") from None
    except OSError as error:
        remove_empty(made)
        raise cannot_write(path, error) from None
    # While this process has the file open, no other file gets its number
    held = file_number(lock_path)

    def check_held():
        if file_number(lock_path) != held:
            raise UserError(f"out: {path} is no longer this process's: {LOCK} was removed or replaced. "
                            "Nothing more is written there")

    try:
        write_holder(lock, lock_path)
        yield check_held
    finally:
        # Removed while it is held, so that whoever has opened the file meanwhile sees that its name is gone
        if not isinstance(lock, SoftFileLock) and file_number(lock_path) == held:
            with contextlib.suppress(OSError):
                os.remove(lock_path)
        lock.release()
        remove_empty(made)


def file_number(path):
    """What tells a file from another of the same name: (device, inode); None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def write_holder(lock, path):
    """Write into the lock file who holds it; where the system has no locks, filelock has done that."""
    if isinstance(lock, SoftFileLock):
        return
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError), open(path, "w") as file:  # a full disk is noticed by what needs it
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")


def read_holder(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return " ".join(file.read().split()) or "another process"
    except OSError:
        return "another process"


def check_is_ours(path):
    """Raises UserError if the folder `path` holds files but no run: they are not this program's."""
    names = sorted(name for name in os.listdir(path) if name != LOCK and not is_unfinished(name, OWN_FILES))
    if names and not is_run(path):
        raise UserError(f"out must be a new or empty folder, or a run, got {path}, which holds {names[0]} "
                        "and no run")


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


@contextlib.contextmanager
def open_run_dir(config, say):
    """Yields the RunDir of `config`, which is this process's (and its other ranks') within. Raises UserError
    if another process holds the folder, or if files of something else lie there."""
    if config.out is None or rank() > 0:
        yield RunDir(config, say)
        return
    with locked_folder(config.out) as check_held:
        check_is_ours(config.out)
        yield RunDir(config, say, check_held)


class RunDir:
    """The folder config.out; without that nothing is kept. All ranks read, rank 0 alone writes, and only
    while check_held() finds that the folder is still its own. Raises UserError."""

    def __init__(self, config, say=print, check_held=None):
        self.config, self.say = config, say
        self.check_held = check_held  # None: this process writes nothing
        self.last_step = None  # of a last.pt that is known to be sound, and so may become previous.pt

    def path(self, name):
        return os.path.join(self.config.out or "", name)

    def begin(self, table, tokenizer):
        """Write what describes the run, before its first step."""
        if self.check_held is None:
            return
        self.check_held()
        for name in os.listdir(self.config.out):
            if is_unfinished(name, OWN_FILES):  # left by a kill
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path(name))
        self.write_text("config.json", json.dumps(asdict(self.config), indent=1))
        self.write_text("table.txt", f"{table}\n")
        keep_tokenizer(tokenizer, self.config.out)

    def write_text(self, name, text):
        self.write_bytes(name, text.encode())

    def write_bytes(self, name, content):
        if self.check_held is not None:
            self.check_held()
            with atomic_file(self.path(name)) as file:
                file.write(content)

    def checkpoint_to_resume(self):
        """The newest undamaged checkpoint, if its settings are config's; None for a new run."""
        if not self.config.out:
            return None
        paths = [path for path in map(self.path, ("last.pt", "previous.pt")) if os.path.exists(path)]
        if not paths:
            self.check_nothing_is_lost()
            return None
        self.checkpoint_path, checkpoint = read_newest(paths, self.say)
        if self.checkpoint_path == self.path("last.pt"):
            self.last_step = checkpoint["step"]
        check_same_settings(self.config, self.checkpoint_path, checkpoint)
        if checkpoint["step"] > self.config.steps:
            raise UserError(f"steps must be at least {checkpoint['step']}, which {self.checkpoint_path} has "
                            f"done, got {self.config.steps}")
        return self.before_decay(checkpoint)

    def check_nothing_is_lost(self):
        """Raises UserError where a new run would replace the only trained weights of an older one."""
        for name in ("best.pt", "stable.pt"):
            path = self.path(name)
            # Killed between its first two files, a run leaves a best.pt of step 0, which is no loss
            if os.path.exists(path) and read_checkpoint(path)["step"] > 0:
                raise UserError(f"out: {self.config.out} holds {name}, but neither last.pt nor previous.pt, "
                                "from which a run resumes; a new run would replace it. Move it away, or "
                                f"choose another --out, with --init_from={path} to start from its weights")

    def before_decay(self, checkpoint):
        """`checkpoint`, or stable.pt if that is where more steps continue as if they had been asked for from
        the start: when a decay is in the way."""
        steps_before = settings_of_checkpoint(checkpoint)["steps"]
        start = decay_start(replace(self.config, steps=steps_before))
        if start is None or steps_before >= self.config.steps or checkpoint["step"] <= start:
            return checkpoint
        stable = self.read_own("stable.pt")
        if stable is None or stable["step"] != start:
            self.say(f"{self.config.out} has no stable.pt of step {start:,}: more steps continue from the "
                     "decayed model")
            return checkpoint
        self.checkpoint_path = self.path("stable.pt")
        self.say(f"{self.checkpoint_path}: more steps continue from here, step {start:,}, before the decay")
        return stable

    def read_own(self, name):
        """The checkpoint `name` of this run; None if it is missing or damaged."""
        path = self.path(name)
        if not os.path.exists(path):
            return None
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpoint as error:
            self.say(f"{error}; doing without it")
            return None
        check_same_settings(self.config, path, checkpoint)
        return checkpoint

    def load(self, checkpoint, dataset, model, optimizer):
        """Copy the state of checkpoint_to_resume()'s result into model and optimizer."""
        check_same_tokens(self.config, dataset, self.checkpoint_path, checkpoint)
        load_state(self.checkpoint_path, checkpoint, model, optimizer)

    def load_best(self, checkpoint, model):
        """Copy the weights of best.pt's `checkpoint` into the model."""
        load_weights(self.path("best.pt"), checkpoint, model)

    def save(self, names, step, past, dataset, model, optimizer):
        """Write one checkpoint under each of `names`. A collective: all ranks, with the same names."""
        if not names or not self.config.out:
            return
        content = checkpoint_content(self.config, dataset, step, past, model, optimizer)
        if self.check_held is None:
            return
        for name in names:
            backup_path = None
            if name == "last.pt" and self.last_step not in (None, step):  # else previous.pt is better
                backup_path = self.path("previous.pt")
            self.check_held()
            write_checkpoint(self.path(name), content, backup_path, self.check_held)
            if name == "last.pt":
                self.last_step = step
