"""Where text comes from: the standard library, local files or the Hugging Face hub, as a stream of documents.

Memory use is bounded, whatever the size of the data set.
"""

import fnmatch
import glob
import hashlib
import importlib
import json
import os
import platform
import re
import sys
import sysconfig
import tokenize

from configure import Config, UserError, closest

FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # builders of `datasets`
COMPRESSIONS = (".gz", ".zst")  # may follow each of them but .parquet, which is compressed inside
OFFLINE = "--dataset=stdlib or a path to local .txt, .jsonl, .csv or .parquet files"
SOURCE_SETTINGS = ("subset", "split", "text_field")  # not every kind of data set has them

# Characters. A .txt may be one book: it is cut at the first blank line after MIN_CHARS, anywhere at MAX_CHARS
MIN_CHARS, MAX_CHARS = 2**14, 2**16

HUB_TIMEOUT = 10  # seconds
STDLIB = sysconfig.get_paths()["stdlib"]
# Folders of the standard library that hold no modules, or only tests
SKIPPED_FOLDERS = re.compile(r"tests?|idle_test|(site|dist)-packages|pydoc_data|config-.*|__\w+__")
GENERATED = re.compile(r"(?mi)^#.*generated (by|from)|^this file is.* generated|character mapping codec")
# The column that `datasets` adds when the rows of a .csv have more fields than its header
EXTRA_CSV_FIELD = "__index_level_0__"


def documents(config):
    """Yields the documents of config's data set: non-blank str, in an order that never changes.

    Raises UserError when the data set cannot be read.
    """
    try:
        for text in read_source(config):
            # Half of a surrogate pair, which JSON can hold, has no UTF-8 form
            text = text.encode("utf-8", "replace").decode()
            if text and not text.isspace():
                yield text
    except UserError:
        raise
    except Exception as error:  # `datasets` and its file formats raise errors of many types
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise UserError(f"dataset: {config.dataset} cannot be read "
                        f"({type(cause).__name__}: {reason})") from error


def read_source(config):
    """Yields the texts of config's data set as they stand in the source, blank ones too."""
    if config.dataset == "stdlib":
        return stdlib_documents()
    if is_hub(config.dataset):
        return hub_documents(config)
    return file_documents(config)


def is_hub(name):
    """Whether `name` is owner/name and neither a local path nor spelled like one."""
    is_owner_and_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return is_owner_and_name and file_format(name) is None and not os.path.exists(name)


def describe(config):
    """{"kind": "stdlib", "local" or "hub", "python": version or None, "files": count, "fingerprint": sha256}.

    The fingerprint changes whenever the text of local files or of the standard library may have changed: it
    covers their names, sizes and, of local files, times of modification. Hub data sets are not fingerprinted.
    Raises UserError for a data set that does not exist, and for a setting that this kind does not have.
    """
    version, files = None, []
    if config.dataset == "stdlib":
        kind, supported = "stdlib", ()
        version = platform.python_version()
        files = [(os.path.relpath(path, STDLIB), os.path.getsize(path)) for path in stdlib_files()]
    elif is_hub(config.dataset):
        kind, supported = "hub", SOURCE_SETTINGS
    else:
        kind, supported = "local", ()
        paths = local_files(config.dataset)
        if any(file_format(path) != ".txt" for path in paths):
            supported = ("text_field",)
        root = os.path.dirname(paths[0])
        for path in paths:
            stat = os.stat(path)
            files.append((os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns))
    reject_unsupported_settings(config, supported)
    fingerprint = hashlib.sha256(json.dumps([version, files]).encode()).hexdigest()
    return {"kind": kind, "python": version, "files": len(files), "fingerprint": fingerprint}


def reject_unsupported_settings(config, supported):
    """Raises UserError when a setting that is not in `supported` differs from its default."""
    for name in SOURCE_SETTINGS:
        default, value = getattr(Config, name), getattr(config, name)
        if name not in supported and value != default:
            raise UserError(f"{name}: got {value}, but {config.dataset} has none; takes --{name}={default}")


# The standard library


def stdlib_files():
    """Sorted paths of the standard library's modules, without tests."""
    found = []
    for folder, subfolders, names in os.walk(STDLIB):
        subfolders[:] = [name for name in subfolders if not SKIPPED_FOLDERS.fullmatch(name)]  # not walked
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found.append(os.path.join(folder, name))
    return sorted(found)


def stdlib_documents():
    """Yields each module's source as one document, without the modules that a program wrote."""
    for path in stdlib_files():
        with tokenize.open(path) as file:  # in the encoding that the module declares
            text = file.read()
        if not GENERATED.search(text[:400]):
            yield text


# Local files


def file_format(path):
    """The key of FORMATS that `path` has, .gz or .zst aside; None for a file that is not read."""
    root, extension = os.path.splitext(path.lower())
    if extension in COMPRESSIONS:
        extension = os.path.splitext(root)[1]
        if extension == ".parquet":
            return None
    if extension in FORMATS:
        return extension
    return None


def local_files(name):
    """Sorted paths of the text files that a path, glob or folder stands for. Raises UserError."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        matches = [path]
    elif os.path.isdir(path):
        matches = walk(path)
    elif glob.has_magic(path):
        matches = find_matches(path)
        if not matches:
            raise UserError(f"dataset: the glob {name} matches nothing; takes one that does, {OFFLINE}")
    else:
        siblings = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*"))
        advice = closest(path, ["stdlib", *siblings])
        raise UserError(f"dataset: no such file or folder: {name}; takes {OFFLINE}, or owner/name{advice}")
    files = sorted(match for match in matches if os.path.isfile(match))
    readable = [file for file in files if file_format(file) is not None]
    if not readable:
        found = f"only others, such as {files[0]}" if files else "none"
        raise UserError(f"dataset: got {name}, takes files that end in {', '.join(FORMATS)} "
                        f"(and {' or '.join(COMPRESSIONS)} after that, but for .parquet); there are {found}")
    return readable


def walk(root, with_hidden=False):
    """The paths of all files under `root`. Each folder is entered once, however many symbolic links lead to
    it, and by its own name where that lies under `root`, so loops end and no document is read twice. Hidden
    files and folders (.name) are left out, unless with_hidden."""
    found, entered = [], set()
    folders, links = [root], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.startswith(".") and not with_hidden:
                continue
            if os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(path)
            elif os.path.exists(path):  # not a link to nowhere, or to itself
                found.append(path)
    return found


def would_read(name, path):
    """Whether the file at `path` belongs to the data set `name`, or would if it were there."""
    if file_format(path) is None or is_hub(name):
        return False
    name, path = os.path.abspath(os.path.expanduser(name)), os.path.abspath(path)
    if os.path.isdir(name):
        return os.path.realpath(path).startswith(os.path.join(os.path.realpath(name), ""))
    return is_match(path.split(os.sep), name.split(os.sep))


def find_matches(pattern):
    """The paths that a glob matches; ** stands for any folders, in which walk() looks."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    split = parts.index("**")
    roots = filter(os.path.isdir, glob.glob(os.sep.join(parts[:split]) or os.sep)) if split else [""]
    parts = [part for part in parts[split:] if part]
    matches = []
    for root in roots:
        for path in walk(root or os.curdir, with_hidden=any(part.startswith(".") for part in parts)):
            path = os.path.relpath(path, root or os.curdir)
            if is_match(path.split(os.sep), parts):
                matches.append(os.path.join(root, path))
    return matches


def is_match(names, parts):
    """Whether the names of a path, from the top, are those that the parts of a glob stand for. As in a shell,
    a hidden name (.name) needs a part that begins with a dot."""
    if not parts:
        return not names
    if parts[0] == "**" and is_match(names, parts[1:]):
        return True
    if not names or names[0].startswith(".") and not parts[0].startswith("."):
        return False
    if parts[0] == "**":
        return is_match(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and is_match(names[1:], parts[1:])


def file_documents(config):
    """Yields documents of local files, format by format: a row is one document in .jsonl, .csv and .parquet;
    a .txt is one document, or several where it is long. Raises UserError."""
    datasets = import_datasets()
    paths = local_files(config.dataset)
    chained = [path for path in paths if "::" in os.path.abspath(path)]
    if chained:  # `datasets` reads a path with :: as a chain of two file systems
        raise UserError(f"dataset: {chained[0]} has :: in its name, which `datasets` cannot open; takes a "
                        "path without it")
    if any(path.lower().endswith(".zst") for path in paths):
        require_zstd()
    for extension, builder in FORMATS.items():
        files = [path for path in paths if file_format(path) == extension]
        if not files:
            continue
        # A split for each file, so that no document reaches from one file into the next
        splits = {f"file{i}": glob.escape(os.path.abspath(path)) for i, path in enumerate(files)}
        options = builder_options(extension, config)
        loaded = datasets.load_dataset(builder, data_files=splits, streaming=True, **options)
        for rows in loaded.values():
            if extension == ".txt":
                yield from split_text(row["text"] for row in rows)
            else:
                if extension == ".csv":
                    rows = reject_extra_fields(rows, config)
                yield from text_column(rows, config)


def builder_options(extension, config):
    """What `datasets` must be told for its defaults not to change the text."""
    if extension == ".txt":
        return {"keep_linebreaks": True, "encoding_errors": "replace", "chunksize": 2**20}
    if extension == ".csv":  # else NA and null in the text are missing values, and 007 is the number 7
        return {"na_filter": False, "converters": {config.text_field: str}}
    if extension == ".parquet":  # else as many rows at once as the first group has, which may be none
        return {"batch_size": 1000}
    return {}


def reject_extra_fields(rows, config):
    """Yields the rows of a .csv. Raises UserError when they have more fields than the header: pandas then
    takes the first for an index and shifts the others, and a text with an unquoted comma loses a part."""
    for row in rows:
        if EXTRA_CSV_FIELD in row:
            raise UserError(f"dataset: {config.dataset} has rows with more fields than its header; takes "
                            "double quotes around text that holds commas")
        yield row


def text_column(rows, config):
    """Yields the text field of each row. Raises UserError when there is none or it does not hold text."""
    field = config.text_field
    for row in rows:
        if field not in row:
            raise UserError(f"text_field: got {field}, but {config.dataset} has the columns {', '.join(row)}")
        value = row[field]
        if value is not None and not isinstance(value, str):
            raise UserError(f"text_field: got {field}, but in {config.dataset} that holds "
                            f"{type(value).__name__}, not text; the columns are {', '.join(row)}")
        yield value or ""


def split_text(lines):
    """Yields documents of MIN_CHARS to 2 * MAX_CHARS characters, cut between lines unless a line is longer
    than MAX_CHARS; the last document may be shorter. Joined, they are the text."""
    parts, size = [], 0
    for line in lines:
        for start in range(0, len(line), MAX_CHARS):  # a file can be one endless line
            part = line[start:start + MAX_CHARS]
            parts.append(part)
            size += len(part)
            at_blank_line = size >= MIN_CHARS and part.isspace()
            if at_blank_line or size >= MAX_CHARS:
                yield "".join(parts)
                parts, size = [], 0
    yield "".join(parts)


# The Hugging Face hub


def hub_documents(config):
    """Yields one document a row, downloaded as it is read. Raises UserError."""
    datasets = import_datasets()
    from huggingface_hub.errors import GatedRepoError

    name = config.dataset
    revision = hub_revision(name)
    try:
        rows = datasets.load_dataset(name, config.subset, split=config.split, revision=revision,
                                     streaming=True)
    except (GatedRepoError, datasets.exceptions.DatasetNotFoundError):
        raise gated_error(name) from None
    except ValueError as error:  # it names the available subsets or splits
        raise UserError(f"subset, split: got {config.subset}, {config.split} of {name}: "
                        f"{' '.join(str(error).split())[:300]}") from None
    yield from text_column(rows, config)


def hub_revision(name):
    """The commit that the hub data set `name` is at now. Raises UserError when the hub does not give it.

    Asked first, and once: `datasets` itself would retry for minutes where the hub is unreachable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return HfApi().dataset_info(name, timeout=HUB_TIMEOUT).sha
    except GatedRepoError:
        raise gated_error(name) from None
    except RepositoryNotFoundError:
        raise UserError(f"dataset: {name} is neither a path nor a public data set on the Hugging Face hub; "
                        f"check the name, log in with `hf auth login`, or use {OFFLINE}") from None
    except Exception as error:
        raise UserError(f"dataset: no path {name}, and the Hugging Face hub is unreachable "
                        f"({type(error).__name__}); check the network, or use {OFFLINE}") from None


def gated_error(name):
    return UserError(f"dataset: {name} is gated on the Hugging Face hub; accept its terms there and log in "
                     f"with `hf auth login`, or use {OFFLINE}")


# Libraries that not every machine has


def import_datasets():
    """The `datasets` library, told not to print. Raises UserError when it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError("dataset: all but stdlib needs the package `datasets`; pip install datasets, or use "
                        "--dataset=stdlib") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures are raised as well
    return datasets


def require_zstd():
    """Raises UserError when `datasets` cannot read .zst files.

    It could with the package `zstandard` too, which takes the end of a truncated file for its regular end.
    """
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError("dataset: .zst files need the package `backports.zstd`; pip install backports.zstd, "
                        "or decompress them with `unzstd`") from None
