"""What a `dataset` setting stands for: the standard library, local files or a data set on the hub."""

import glob
import hashlib
import json
import os
import platform
import re
import sysconfig

from configure import Config, UserError, hint

TYPES = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # file ending: builder of `datasets`
OFFLINE = "--dataset=stdlib or a path to local .txt, .jsonl or .parquet files"
NO_SOURCE = re.compile(r"tests?|idle_test|(site|dist)-packages|pydoc_data|config-.*|__\w+__")  # folder names
STDLIB = sysconfig.get_paths()["stdlib"]


def ending(path):
    return os.path.splitext(path)[1].lower()


def stdlib_files():
    """Sorted paths of the standard library's modules, without tests."""
    found = []
    for folder, folders, files in os.walk(STDLIB):
        folders[:] = [name for name in folders if not NO_SOURCE.fullmatch(name)]
        modules = [name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        found += [os.path.join(folder, name) for name in modules]
    return sorted(found)


def local_files(name):
    """Sorted paths of the text files that a path, glob or folder stands for. Raises UserError."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        found = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
    elif glob.has_magic(path):
        found = glob.glob(path, recursive=True)
        if not found:
            raise UserError(f"dataset: the glob {name} matches nothing; takes one that does, {OFFLINE}")
    else:
        siblings = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*"))
        near = hint(path, ["stdlib", *siblings])
        raise UserError(f"dataset: no such file or folder: {name}; takes {OFFLINE}, or owner/name{near}")
    found = sorted(filter(os.path.isfile, found))
    kept = [file for file in found if ending(file) in TYPES]
    if not kept:
        there = f"only others, such as {found[0]}" if found else "none"
        raise UserError(f"dataset: got {name}, takes files that end in {', '.join(TYPES)}; there are {there}")
    return kept


def is_hub(name):
    """Whether `name` is owner/name and neither a local path nor spelled like one."""
    spelled = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and ending(name) not in TYPES
    return bool(spelled) and not os.path.exists(name)


def describe(config):
    """{"kind": stdlib, local or hub, "files", "fingerprint"}: it changes whenever local text may have.

    Raises UserError for a data set that is not there and for a setting that this kind does not have.
    """
    name, used, files = config.dataset, {"subset", "split", "text_field"}, []
    if name == "stdlib":
        kind, used = "stdlib", set()
        files = [(os.path.relpath(file, STDLIB), os.path.getsize(file)) for file in stdlib_files()]
    elif is_hub(name):
        kind = "hub"
    else:
        kind, paths = "local", local_files(name)
        used = {"text_field"} - ({"text_field"} if {*map(ending, paths)} == {".txt"} else set())
        root, stats = os.path.dirname(paths[0]), [os.stat(file) for file in paths]
        files = [(os.path.relpath(file, root), stat.st_size, stat.st_mtime_ns)
                 for file, stat in zip(paths, stats, strict=True)]
    for setting in ("subset", "split", "text_field"):
        default, value = getattr(Config, setting), getattr(config, setting)
        if setting not in used and value != default:
            raise UserError(f"{setting}: got {value}, but {name} has none; takes --{setting}={default}")
    version = platform.python_version() if kind == "stdlib" else None
    fingerprint = hashlib.sha256(json.dumps([version, files]).encode()).hexdigest()
    return {"kind": kind, "python": version, "files": len(files), "fingerprint": fingerprint}
