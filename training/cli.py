"""What train.py's command line needs besides settings: a run directory, signals, and errors in one line."""

import contextlib
import glob
import os
import re
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from configure import FOR_TARGET, UNFINISHED, UserError, is_from_search, split_words, stop
from training.distributed import from_rank0, rank, world_size
from training.run_dir import claim_folder, remove_empty, unfinished_steps


def reject_missing_target(argv):
    """Raises UserError where the best.py of a search is all that says what to train: it leaves the size
    and the batches to its target, and would train the defaults. A width, a depth or init_from given by hand
    says it, too."""
    sources, flags = split_words(argv)
    if sources and all(map(is_from_search, sources)) and not {"width", "depth", "init_from"} & flags.keys():
        target, _ = read_header(sources[-1])
        command = f"python train.py {target or 'TARGET.py'} {sources[-1]}"
        raise UserError(f"{sources[-1]} says how to train, not what: give its target before it, `{command}`, "
                        "or --width and --depth")


def read_header(source):
    """(the target's file, or None where it is not named; whether the search was finished) of a best.py."""
    lines = Path(source).read_text("utf-8").splitlines()
    targets = [line.removeprefix(FOR_TARGET) for line in lines if line.startswith(FOR_TARGET)]
    return targets[0] if targets else None, not any(line.endswith(f"{UNFINISHED}.") for line in lines)


def describe_search(argv):
    """Lines about the best.py among the files of the command line: that its search is not finished, or was
    for another target."""
    sources, _ = split_words(argv)
    lines = []
    for source in filter(is_from_search, sources):
        target, is_finished = read_header(source)
        if not is_finished:
            lines.append(f"{source}: its search is not finished; this is the best so far")
        if target and os.path.basename(target) not in map(os.path.basename, sources):
            lines.append(f"{source}: its search was for {target}")
    return lines


@contextlib.contextmanager
def chosen_run_dir(config, argv):
    """Yields `config` with `out`: as given, or out/NAME, or the first of out/NAME-2, out/NAME-3, ... that
    does not exist yet. That folder is made at once, so that nobody else chooses it, and removed again if the
    block leaves it empty. A collective."""
    if config.out is not None:
        yield config
        return
    out, made = None, []
    if rank() == 0:
        name = os.path.join("out", run_name(argv))
        out, made = claim_folder(name)
        say_unfinished(name, out)
    try:
        yield replace(config, out=from_rank0(out))
    finally:
        remove_empty(made)


def say_unfinished(name, out):
    """Says on stderr which runs of the name `name` stopped before their end, and how to resume the last of
    them, where the same command begins a new one, in the folder `out`."""
    folders = [path for path in glob.glob(f"{glob.escape(name)}*")
               if re.fullmatch(r"(-\d+)?", path.removeprefix(name))]
    unfinished = []
    for folder in sorted(folders, key=lambda path: (len(path), path)):  # -10 after -9
        steps = unfinished_steps(folder)
        if steps is not None:
            unfinished.append(f"{folder} (after {steps:,} steps)")
            resume = f"`python train.py {folder}` resumes it"
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}; {resume}. This is a new run, in {out}", file=sys.stderr)


def run_name(argv):
    """The name of a run: that of the last config file of the command line. The best.py of a search says how a
    target is trained, not which; without a target the run is named after the search."""
    files = [word for word in argv if word.endswith(".py")] or ["run.py"]
    targets = [path for path in files if os.path.basename(path) != "best.py" and not is_from_search(path)]
    if targets:
        return os.path.basename(targets[-1]).removesuffix(".py")
    return f"{os.path.basename(os.path.dirname(os.path.abspath(files[-1])))}-best"


@contextlib.contextmanager
def catch_signals():
    """Yields a list that gets the first SIGINT or SIGTERM, for the loop to end on; a second ends at once.
    Raises KeyboardInterrupt at its end in a command of the lab that got one."""
    caught, handlers_before = [], {}

    def catch(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers_before[number] = signal.signal(number, catch)
    try:
        yield caught
    except BaseException:
        # One process of several fails when another has died. torchrun then ends all of them by SIGTERM, which
        # must not end this one before it has said so
        if world_size() > 1:
            handlers_before.pop(signal.SIGTERM, None)
        raise
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
    # A command of the lab trains many runs: a signal ends them all, one after the last step of this run too
    if caught and handlers_before.get(signal.SIGTERM) is stop:
        stop(caught[0], None)


@contextlib.contextmanager
def errors_in_one_line(config):
    """Turns what torch raises when another process has died, or when memory is short, into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if world_size() > 1 and re.search("gloo|NCCL|onnection", str(error)):
            raise UserError(f"{config.out}: another process died; `train.py {config.out}` resumes") from None
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise UserError(f"micro_batch: {config.micro_batch or config.batch} sequences do not fit in "
                        "the device's memory; try a smaller divisor of batch, or a smaller model") from None
