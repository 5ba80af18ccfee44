"""What a run takes of its data: the size of the vocabulary, and batches before the device asks for them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from configure import UserError
from data.processes import processes


def sized(config, data):
    """`config` with the rows of embedding and readout that its model has. Raises UserError."""
    size = config.vocab_size or data.vocab_size
    if size < data.vocab_size:
        raise UserError(f"vocab_size: got {size}, takes at least the tokenizer's {data.vocab_size}")
    return replace(config, vocab_size=size)


def feed(data, config, device, start):
    """Yields the batch of each step from `start` on, (2, passes, B, T): tokens and targets, in passes of B
    sequences. A thread gathers those of the next steps meanwhile. Raises UserError."""
    rank, world = processes()
    rows = config.batch // world  # of this process
    size = config.micro_batch or rows
    if config.batch % (world * size):
        raise UserError(f"batch: got {config.batch}, takes a multiple of {world * size}: {size} sequences "
                        f"in a pass, {world} processes")
    mine = slice(rank * rows, (rank + 1) * rows)
    ahead = max(1, 2**19 // (rows * config.context))  # steps

    def gather(first):
        steps = range(first, min(first + ahead, config.steps))
        pair = data.batch(config.seed, steps, config.batch, config.context, mine)
        batch = torch.stack(pair, 1).view(len(steps), 2, -1, size, config.context)
        return batch.pin_memory() if device.type == "cuda" else batch

    def batches():
        with ThreadPoolExecutor(1) as thread:
            chunk = thread.submit(gather, start)
            for first in range(start, config.steps, ahead):
                batch = chunk.result().to(device, non_blocking=True)
                if first + ahead < config.steps:
                    chunk = thread.submit(gather, first + ahead)
                yield from batch

    return batches()
