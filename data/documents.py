"""Text as a stream of documents, in bounded memory, whatever the data set's size."""

import glob
import os
import re
import tokenize

from configure import UserError
from data.sources import OFFLINE, TYPES, ending, is_hub, local_files, stdlib_files

# Characters. A .txt may be one book: it is cut at the first blank line after SHORTEST, anywhere at LONGEST
SHORTEST, LONGEST = 2**14, 2**16
HUB_TIMEOUT = 10  # seconds
GENERATED = re.compile(r"(?mi)^#.*generated (by|from)|^this file is.* generated|character mapping codec")


def documents(config):
    """Yields the documents of config's data set: str, none blank, always in one order. Raises UserError."""
    name = config.dataset
    read = from_stdlib if name == "stdlib" else from_hub if is_hub(name) else from_files
    try:
        for text in read(config):
            text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
            if text and not text.isspace():
                yield text
    except UserError:
        raise
    except Exception as error:  # whatever `datasets` and its file formats raise
        cause = error.__cause__ or error
        said = " ".join(str(cause).split())[:200]
        raise UserError(f"dataset: {name} cannot be read ({type(cause).__name__}: {said})") from error


def from_stdlib(config):
    """One document a module, without those that a program wrote."""
    for path in stdlib_files():
        with tokenize.open(path) as file:
            text = file.read()
        if not GENERATED.search(text[:400]):
            yield text


def from_files(config):
    """A row is one document in .jsonl and .parquet; a .txt gives one or, where it is long, several."""
    datasets = quiet_datasets()
    paths = local_files(config.dataset)
    for end, builder in TYPES.items():
        # A split for each file, so that no document reaches from one file into the next
        splits = {f"file{i}": glob.escape(os.path.abspath(path))
                  for i, path in enumerate(path for path in paths if ending(path) == end)}
        lines = {"keep_linebreaks": True, "encoding_errors": "replace", "chunksize": 2**20}
        options = {"data_files": splits, "streaming": True, **(lines if end == ".txt" else {})}
        for rows in datasets.load_dataset(builder, **options).values() if splits else ():
            yield from regroup(row["text"] for row in rows) if end == ".txt" else column(rows, config)


def from_hub(config):
    """One document a row, downloaded as it is read."""
    datasets = quiet_datasets()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = config.dataset
    gated = UserError(f"dataset: {name} is gated on the Hugging Face hub; accept its terms there and log in "
                      f"with `hf auth login`, or use {OFFLINE}")
    try:  # `datasets` itself would try again for minutes
        revision = HfApi().dataset_info(name, timeout=HUB_TIMEOUT).sha
    except GatedRepoError:
        raise gated from None
    except RepositoryNotFoundError:
        raise UserError(f"dataset: {name} is neither a path nor a public data set on the Hugging Face hub; "
                        f"check the name, log in with `hf auth login`, or use {OFFLINE}") from None
    except Exception as error:
        raise UserError(f"dataset: no path {name}, and the Hugging Face hub is unreachable "
                        f"({type(error).__name__}); check the network, or use {OFFLINE}") from None
    try:
        rows = datasets.load_dataset(name, config.subset, split=config.split, revision=revision,
                                     streaming=True)
    except (GatedRepoError, datasets.exceptions.DatasetNotFoundError):
        raise gated from None
    except ValueError as error:  # it names the subsets or splits that there are
        raise UserError(f"subset, split: got {config.subset}, {config.split} of {name}: "
                        f"{' '.join(str(error).split())[:300]}") from None
    yield from column(rows, config)


def column(rows, config):
    """The text field of each row. Raises UserError when there is none or it holds no text."""
    field = config.text_field
    for row in rows:
        if field not in row:
            raise UserError(f"text_field: got {field}, but {config.dataset} has the columns {', '.join(row)}")
        if not isinstance(row[field], str | None):
            raise UserError(f"text_field: got {field}, but in {config.dataset} that holds "
                            f"{type(row[field]).__name__}, not text; the columns are {', '.join(row)}")
        yield row[field] or ""


def regroup(lines):
    """Yields documents of SHORTEST to 2 * LONGEST characters from whole lines; the last may be shorter."""
    parts, size = [], 0
    for line in lines:
        for start in range(0, len(line), LONGEST):  # a file can be one endless line
            parts.append(line[start:start + LONGEST])
            size += len(parts[-1])
            if size >= LONGEST or size >= SHORTEST and parts[-1].isspace():
                yield "".join(parts)
                parts, size = [], 0
    yield "".join(parts)


def quiet_datasets():
    """The `datasets` library, told to leave the terminal alone; not every machine has it."""
    try:
        import datasets
    except ImportError:
        raise UserError("dataset: all but stdlib needs the package `datasets`; pip install datasets, or use "
                        "--dataset=stdlib") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures are raised as well
    return datasets
