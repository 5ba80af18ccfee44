"""Prepare a data set by hand: python -m data.prepare --dataset=... --tokenizer=... [CONFIG.py ...]

train.py does the same when it finds its data set not prepared.
"""

from configure import configure
from data.batches import Data
from data.folders import prepare
from data.processes import command


def main(argv):
    data = Data(prepare(configure(argv)))
    print(data.folder)
    for split in ("train", "val"):
        counts = data.meta[split]
        print(f"{split:5}  {counts['documents']:>10,} documents  {counts['tokens']:>13,} tokens  "
              f"{counts['bytes']:>13,} bytes")
    print(f"{data.meta['bytes_per_token']:.2f} bytes per token, {data.vocab_size:,} tokens in the vocabulary")


if __name__ == "__main__":
    command(main)
