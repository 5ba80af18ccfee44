"""Prepared folders: written whole or not at all.

train.bin, val.bin      token ids, little endian, an end-of-text token after each document
tokenizer.tiktoken      the tokenizer's ranks; its pattern and special tokens stand in meta.json
meta.json               settings, source, tokenizer, counts, sha256
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import time

from configure import UserError
from data import encodings, sources
from data.batches import Data
from data.tokens import durable, write

FORMAT = 1  # of what is in a folder; one more when old folders should not be used any longer
SETTINGS = ("dataset", "tokenizer", "subset", "split", "text_field", "max_tokens", "val_fraction")
DAY = 24 * 60 * 60  # seconds


def prepare(config):
    """The path of config's prepared folder, which is written first when it is not there. Raises UserError.

    A prepared folder is also a data set by itself, as for a machine that lacks the text or the libraries.
    """
    if os.path.isfile(os.path.join(config.dataset, "meta.json")):
        return prepared(config)
    encodings.check(config.tokenizer)
    source = sources.describe(config)
    settings = {name: getattr(config, name) for name in SETTINGS}
    identity = hashlib.sha256(json.dumps([FORMAT, settings, source], sort_keys=True).encode()).hexdigest()
    readable = f"{os.path.basename(config.dataset.rstrip('/'))}-{config.tokenizer}"
    slug = re.sub(r"\W+", "-", readable).strip("-")
    folder = os.path.join(config.data_dir, f"{slug[:60]}-{identity[:12]}")
    if os.path.isdir(folder):
        return folder
    temporary = os.path.join(config.data_dir, f".{os.path.basename(folder)}.{secrets.token_hex(4)}")
    try:
        os.makedirs(temporary)
        remove_stale(config.data_dir)
        meta = {"format": FORMAT, "settings": settings, "source": source, **write(config, temporary)}
        with durable(os.path.join(temporary, "meta.json")) as file:
            file.write(json.dumps(meta, indent=1).encode())
        os.rename(temporary, folder)
    except OSError as error:
        if not os.path.isdir(folder):  # else another process was first, with the same tokens
            raise UserError(f"data_dir: cannot write {config.data_dir} ({error.strerror}); takes a folder "
                            "that can be written, with room for the tokens") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def prepared(config):
    """The prepared folder that config.dataset is itself. Raises UserError when it is not what config says."""
    settings = Data(config.dataset).meta["settings"]
    for name in SETTINGS[1:]:
        if settings.get(name) != getattr(config, name):
            raise UserError(f"{name}: got {getattr(config, name)}, but {config.dataset} was prepared with "
                            f"{settings.get(name)}; takes --{name}={settings.get(name)}")
    return config.dataset


def remove_stale(data_dir):
    """Deletes what killed preparations left: temporary folders that nothing was written to for a day."""
    for name in os.listdir(data_dir):
        folder = os.path.join(data_dir, name)
        if re.fullmatch(r"\..+-[0-9a-f]{12}\.[0-9a-f]{8}", name):
            with contextlib.suppress(OSError):  # another process may delete it too
                paths = [folder, *glob.glob(os.path.join(glob.escape(folder), "*"))]
                if time.time() - max(map(os.path.getmtime, paths)) > DAY:
                    shutil.rmtree(folder)
