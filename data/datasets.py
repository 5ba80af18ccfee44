"""Where text comes from: the standard library, local files or the Hugging Face hub, as a stream of documents.

At most one row, or about MAX_CHARS of a text file, is in memory at a time, whatever the size of the data set.
"""

import codecs
import contextlib
import csv
import fnmatch
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import re
import sys
import sysconfig
import tokenize

from configure import Config, UserError, closest

TEXT_ENDINGS = (".txt .text .md .markdown .rst .org .adoc .tex .html .htm .xml .css .py .pyi .c .h .cc .cpp "
                ".hpp .cs .java .kt .scala .swift .go .rs .js .jsx .ts .tsx .php .rb .pl .lua .jl .r .hs .ml "
                ".sh .sql").split()
ROW_ENDINGS = (".jsonl", ".parquet", ".csv")  # whose rows are documents; read in this order, after the text
COMPRESSIONS = (".gz", ".zst")  # may follow each of them but .parquet, which is compressed inside
OFFLINE = "--dataset=stdlib or a path to local text, .jsonl, .csv or .parquet files"
SOURCE_SETTINGS = ("subset", "split", "text_field")  # not every kind of data set has them
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig",
                    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # begins as UTF-16's does
                    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

# Characters. A text file may be one book: it is cut at a blank line after MIN_CHARS, anywhere at MAX_CHARS
MIN_CHARS, MAX_CHARS = 2**14, 2**16
ROWS_WITHOUT_TEXT = 1000  # rows of .jsonl without the field `text_field` until that is taken for an error
PARQUET_ROWS = 100  # read at a time

HUB_TIMEOUT = 10  # seconds
STDLIB = sysconfig.get_paths()["stdlib"]
# Folders of the standard library that hold no modules, or only tests
SKIPPED_FOLDERS = re.compile(r"tests?|idle_test|(site|dist)-packages|pydoc_data|config-.*|__\w+__")
GENERATED = re.compile(r"(?mi)^#.*generated (by|from)|^this file is.* generated|character mapping codec")


def documents(config):
    """Yields the documents of config's data set: non-blank str, in an order that never changes.

    Raises UserError when the data set cannot be read.
    """
    with reading(config.dataset):
        for text in read_source(config):
            # Half of a surrogate pair, which JSON can hold, has no UTF-8 form
            text = text.encode("utf-8", "replace").decode()
            if text and not text.isspace():
                yield text


def read_source(config):
    """Yields the texts of config's data set as they stand in the source, blank ones too."""
    if config.dataset == "stdlib":
        yield from stdlib_documents()
    elif is_hub(config.dataset):
        yield from hub_documents(config)
    else:
        for path in local_files(config.dataset):
            with reading(path):
                yield from file_documents(path, config.text_field)


@contextlib.contextmanager
def reading(source):
    """Raises UserError where `source` cannot be read."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        around = error.object[max(0, error.start - 20):error.end + 10]
        raise UserError(f"dataset: {source} must be text in UTF-8, or in UTF-16 or UTF-32 with a byte order "
                        f"mark, but holds {around!r}; try `iconv -f latin1 -t utf-8`") from None
    except OSError as error:
        raise UserError(f"dataset: cannot read {error.filename or source} "
                        f"({error.strerror or ' '.join(str(error).split())})") from None
    except Exception as error:  # the libraries that read files and the hub raise errors of many types
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise UserError(f"dataset: cannot read {source} ({type(cause).__name__}: {reason})") from error


def is_hub(name):
    """Whether `name` is owner/name and neither a local path nor spelled like one."""
    is_owner_and_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return is_owner_and_name and ending(name) is None and not os.path.exists(name)


def describe(config):
    """({"kind": "stdlib", "local" or "hub", "python": version or None, "files": count,
    "fingerprint": sha256}, when it changed last, in ns).

    The fingerprint covers the names and sizes of local files and of the standard library's, and of local
    files the times of modification. A program can set those back; the time of change, which is returned too,
    only the system sets. Hub data sets are not fingerprinted. Raises UserError for a data set that does not
    exist, and for a setting that this kind does not have.
    """
    version, files, changed = None, [], 0
    reject_unsupported_settings(config)
    if config.dataset == "stdlib":
        kind = "stdlib"
        version = platform.python_version()
        files = [(os.path.relpath(path, STDLIB), os.path.getsize(path)) for path in stdlib_files()]
    elif is_hub(config.dataset):
        kind = "hub"
    else:
        kind = "local"
        paths = local_files(config.dataset)
        root = os.path.dirname(paths[0])
        with reading(config.dataset):
            for path in paths:
                status = os.stat(path)
                files.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
                changed = max(changed, status.st_ctime_ns)
    fingerprint = hashlib.sha256(json.dumps([version, files]).encode()).hexdigest()
    return {"kind": kind, "python": version, "files": len(files), "fingerprint": fingerprint}, changed


def supported_settings(name):
    """Those of SOURCE_SETTINGS that the data set `name` has. Raises UserError."""
    if name == "stdlib":
        return ()
    if is_hub(name):
        return SOURCE_SETTINGS
    has_rows = any(ending(path) in ROW_ENDINGS for path in local_files(name))
    return ("text_field",) if has_rows else ()


def reject_unsupported_settings(config):
    """Raises UserError when a setting that the data set does not have differs from its default."""
    supported = supported_settings(config.dataset)
    for name in SOURCE_SETTINGS:
        default, value = getattr(Config, name), getattr(config, name)
        if name not in supported and value != default:
            raise UserError(f"{name} must be {default}: {config.dataset} has no {name}, got {value}")


def parse_mixture(name):
    """[(data set, weight)] of a mixture, stdlib:0.7,texts/:0.3; [] of one data set. Raises UserError."""
    found = [re.fullmatch(r"(.+):(\d*\.?\d+)", part) for part in name.split(",")]
    if not any(found) or os.path.exists(os.path.expanduser(name)):
        return []
    parts = {part[1].strip(): float(part[2]) for part in found if part}
    if len(parts) < len(found) or len(parts) < 2 or 0 in parts.values():
        raise UserError("dataset must be one data set, or several different ones, each with a weight above "
                        f"0, such as stdlib:0.7,texts/:0.3, got {name}")
    return [*parts.items()]


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


# Which local files


def ending(path):
    """The ending that says how `path` is read, .gz or .zst aside; None for a file that is not read."""
    root, extension = os.path.splitext(path.lower())
    if extension in COMPRESSIONS:
        extension = os.path.splitext(root)[1]
        if extension == ".parquet":
            return None
    return extension if extension in (*TEXT_ENDINGS, *ROW_ENDINGS) else None


def local_files(name):
    """The text files that a path, glob or folder stands for, in the order in which they are read. A file that
    is named itself, or by its ending as in *.log, is taken for text where its ending is not a known one.
    Raises UserError."""
    path = os.path.expanduser(name)
    with reading(name):
        if os.path.isfile(path):
            files = [path]
        elif os.path.isdir(path):
            files = walk(path)
        elif glob.has_magic(path):
            files = [match for match in find_matches(path) if os.path.isfile(match)]
        else:
            raise no_such_file(name, path)
    last_part = os.path.splitext(path)[1] or os.path.basename(path)
    is_named = not os.path.isdir(path) and not glob.has_magic(last_part)
    readable = [file for file in files if ending(file) or is_named and may_be_text(file)]
    if not readable:
        found = f"only others, such as {min(files)}" if files else "none"
        raise UserError(f"dataset {name} must hold text files such as .txt, .md or .py, or rows in .jsonl, "
                        f".csv or .parquet files (or .txt.gz, .txt.zst and so on); there are {found}")
    formats = {extension: number for number, extension in enumerate(ROW_ENDINGS, start=1)}
    return sorted(readable, key=lambda file: (formats.get(ending(file), 0), file))


def may_be_text(path):
    """Whether a file whose ending is not known may be read as text; .json would be one large row."""
    return not re.search(r"\.json(\.gz|\.zst)?$|\.parquet\.\w+$", path.lower())


def no_such_file(name, path):
    """The UserError for a path that is no file, folder or glob. Raises OSError where that cannot be told."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)
        return UserError(f"dataset must be a file or a folder, but {name} is a pipe or a device, which "
                         "cannot be read twice; write its content to a file first")
    siblings = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*"))
    advice = closest(path, ["stdlib", *siblings])
    return UserError(f"dataset: no such file or folder: {name}; try {OFFLINE}, or owner/name on the "
                     f"Hugging Face hub{advice}")


def walk(root, with_hidden=False):
    """The paths of all files under `root`. Each folder is entered once, however many symbolic links lead to
    it, so loops end and no document is read twice. Hidden files and folders (.name) are left out, unless
    with_hidden. Raises OSError."""
    found, entered, folders = [], set(), [root]
    while folders:
        folder = folders.pop(0)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        names = [name for name in sorted(os.listdir(folder)) if with_hidden or not name.startswith(".")]
        paths = [os.path.join(folder, name) for name in names]
        found += [path for path in paths if os.path.isfile(path)]
        # By its own name where it has one here: links come last
        folders = [path for path in paths if os.path.isdir(path) and not os.path.islink(path)] + folders
        folders += [path for path in paths if os.path.isdir(path) and os.path.islink(path)]
    return found


def would_read(name, path):
    """Whether the file at `path` belongs to the data set `name`, or would if it were there."""
    if parts := parse_mixture(name):
        return any(would_read(part, path) for part, _ in parts)
    if ending(path) is None or is_hub(name):
        return False
    with reading("the working directory"):  # it may be gone
        name, path = os.path.abspath(os.path.expanduser(name)), os.path.abspath(path)
    if os.path.isdir(name):
        return os.path.realpath(path).startswith(os.path.join(os.path.realpath(name), ""))
    return is_match(path.split(os.sep), name.split(os.sep))


def find_matches(pattern):
    """The paths that a glob matches; ** stands for any folders, in which walk() looks. Raises OSError."""
    parts = os.path.normpath(pattern).split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    fixed = [*itertools.takewhile(lambda part: not glob.has_magic(part), parts)]
    root = os.path.join(os.sep, *fixed) if os.path.isabs(pattern) else os.path.join(os.curdir, *fixed)
    with_hidden = any(part.startswith(".") for part in parts[len(fixed):])
    paths = map(os.path.normpath, walk(root, with_hidden) if os.path.isdir(root) else [])
    return [path for path in paths if is_match(path.split(os.sep), parts)]


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


# What is in a local file


def file_documents(path, field):
    """Yields the documents of a file: a row is one document in .jsonl, .csv and .parquet; text is one
    document, or several where it is long. Raises UserError, and whatever the format's library raises."""
    if ending(path) == ".jsonl":
        yield from text_column(path, field, jsonl_rows(path))
    elif ending(path) == ".csv":
        yield from text_column(path, field, csv_rows(path))
    elif ending(path) == ".parquet":
        yield from text_column(path, field, parquet_rows(path, field))
    else:
        yield from split_text(path)


def text_column(source, field, rows):
    """Yields the text in column `field` of `rows`, dicts, which need not all have it. Raises UserError."""
    found, row = False, {}
    for number, row in enumerate(rows):
        found = found or field in row
        if not found and number > ROWS_WITHOUT_TEXT:
            break
        value = row.get(field)
        if value is not None and not isinstance(value, str):
            raise UserError(f"text_field must be a column of text, but {field} in {source} holds "
                            f"{str(value)[:40]}")
        yield value or ""
    if row and not found:
        raise UserError(f"text_field must be one of {', '.join(row)}, the columns of {source}, got {field}")


def open_bytes(path):
    """The file at `path`, opened and decompressed. Raises UserError and OSError."""
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    if path.lower().endswith(".zst"):
        return import_zstd().open(path)
    return open(path, "rb")


def open_text(path, newline=None):
    """The same, decoded: as its byte order mark says, or from UTF-8. Raises UserError and OSError."""
    with open_bytes(path) as file:
        head = file.read(4096)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and head.count(0) > len(head) / 4:
        raise UserError(f"dataset: {path} is full of zero bytes: it must be text in UTF-8, or in UTF-16 or "
                        "UTF-32 with a byte order mark; try `iconv -f utf-16le -t utf-8`")
    return io.TextIOWrapper(open_bytes(path), encoding, newline=newline)


def split_text(path):
    """Yields documents of MIN_CHARS to 2 * MAX_CHARS characters, cut between lines unless a line is longer
    than MAX_CHARS, then at white space if it has any; the last document may be shorter. Joined, they are the
    text, with \\n at the end of each line."""
    parts, size = [], 0
    with open_text(path) as file:
        for line in bounded_lines(file):
            parts.append(line)
            size += len(line)
            at_blank_line = size >= MIN_CHARS and line.isspace()
            if at_blank_line or size >= MAX_CHARS:
                yield "".join(parts)
                parts, size = [], 0
    yield "".join(parts)


def bounded_lines(file):
    """Yields the lines of a text file; of one with more than MAX_CHARS characters, parts of about as many."""
    rest = ""
    while part := file.readline(MAX_CHARS):
        line, rest = rest + part, ""
        if len(part) == MAX_CHARS and part[-1] != "\n" and (found := re.match(r"(?s:.*\S)(?=\s.)", line)):
            line, rest = line[:found.end()], line[found.end():]
        yield line
    yield rest


def jsonl_rows(path):
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line, parse_int=float)  # Python makes no int of thousands of digits
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is {type(row).__name__}, not an object such as "
                                 '{"text": "some text"}')
            yield row


def csv_rows(path):
    csv.field_size_limit(2**31 - 1)  # characters; the default is 2**17
    with open_text(path, newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for row in rows:
            if None in row:
                raise UserError(f"dataset: line {rows.line_num} of {path} has more fields than its header; "
                                "text that holds commas must stand in double quotes")
            yield row


def parquet_rows(path, field):
    """Rows with nothing but `field`, if there is such a column."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        names = file.schema_arrow.names
        for batch in file.iter_batches(PARQUET_ROWS, columns=[field] if field in names else names):
            yield from batch.to_pylist()


def import_zstd():
    """The module that reads .zst files. Raises UserError when it is not installed."""
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("dataset: .zst files need the package `backports.zstd`; pip install backports.zstd, "
                        "or decompress them with `unzstd`") from None


# The Hugging Face hub


def hub_documents(config):
    """Yields one document a row, downloaded as it is read. Raises UserError."""
    try:
        import datasets
    except ImportError:
        raise UserError("dataset: a data set of the Hugging Face hub needs the package `datasets`; pip "
                        f"install datasets, or use {OFFLINE}") from None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures are raised as well
    name = config.dataset
    try:
        # Asked first, and once: `datasets` itself would retry for minutes where the hub is unreachable
        revision = HfApi().dataset_info(name, timeout=HUB_TIMEOUT).sha
        rows = datasets.load_dataset(name, config.subset, split=config.split, revision=revision,
                                     streaming=True)
    except (GatedRepoError, datasets.exceptions.DatasetNotFoundError):
        raise UserError(f"dataset: {name} is gated on the Hugging Face hub; accept its terms there and log "
                        f"in with `hf auth login`, or use {OFFLINE}") from None
    except RepositoryNotFoundError:
        raise UserError(f"dataset: {name} is neither a path nor a public data set on the Hugging Face hub; "
                        f"check the name, log in with `hf auth login`, or use {OFFLINE}") from None
    except ValueError as error:  # it names the available subsets or splits
        raise UserError(f"subset, split: got {config.subset}, {config.split} of {name}: "
                        f"{' '.join(str(error).split())[:300]}") from None
    except Exception as error:
        raise UserError(f"dataset: there is no path {name}, and the Hugging Face hub is unreachable "
                        f"({type(error).__name__}); check the network, or use {OFFLINE}") from None
    yield from text_column(name, config.text_field, rows)
