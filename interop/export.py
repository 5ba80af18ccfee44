"""Write a run as a Hugging Face model: python -m interop.export RUN_DIR --to=DIR

config.json and model.safetensors for a class of transformers that computes the same without code of ours,
tokenizer.json for its AutoTokenizer, and README.md, a model card. RUN_DIR stands for its best weights,
RUN_DIR/last.pt for the newest. transformers loads what was written, and unless its logits are those of our
model, nothing is kept.
"""

# A command: nothing imports it

import json
import os
import shutil
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported; run_cli ends it

from configure import UserError, asks_for_help, is_from_run, run_cli, run_of
from data.files import write_text
from data.tokenizer import keep_tokenizer
from interop.weights import check_same_logits, import_transformers, with_large_weights, write_model
from training.pretrained import build_pretrained, read_pretrained, tokenizer_of
from training.run_dir import claim_folder

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT of {parameters:,} parameters, {architecture} in transformers: {width} channels, {depth} blocks, heads of
{head_dim}, contexts of up to {context} tokens.

```
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = tokenizer("{eot}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```

| trained | |
|---|---|
| data set | {dataset} |
| tokenizer | {tokenizer}, {vocab_size:,} tokens |
| started from | {start} |
| steps | {step:,} of {steps:,}, each of {batch_tokens:,} tokens |
| optimizer | {optimizer}, peak lr {lr:.4g} at the base shape, {schedule} schedule |
| validation loss | {val_loss} |
| training loss | {train_loss} |

Every multiplier of the parametrization it was trained in ({parametrization}) is folded into the weights. Text
begins after an end of text, `{eot}`. Settings of the run:

```
{settings}
```
"""


def card(name, checkpoint, settings, vocab_size, parameters, architecture):
    """The model card of a run's checkpoint, in Markdown."""
    step, (_, _, history) = checkpoint["step"], checkpoint["past"]
    row = next((row for row in reversed(history) if row["step"] <= step and "val_loss" in row), {})
    losses = [row["train_loss"] for row in history if row["step"] <= step and "train_loss" in row]
    val_loss = "not evaluated"
    if row:
        val_loss = (f"{row['val_loss']:.4f} nats per token, {row['val_bits_per_byte']:.4f} bits per byte, "
                    f"after step {row['step']:,}")
    last = losses[-100:]
    train_loss = f"{sum(last) / len(last):.4f}, mean of the last {len(last)} steps" if last else "not trained"
    shown = settings | {"vocab_size": vocab_size}
    return CARD.format(
        **shown, name=name, parameters=parameters, architecture=architecture, step=step, val_loss=val_loss,
        batch_tokens=settings["batch"] * settings["context"], train_loss=train_loss, eot="<|endoftext|>",
        start=settings["init_from"] or "random weights", settings=json.dumps(settings, indent=1))


def export(source, folder):
    """Write the Hugging Face model of the run `source` into `folder`, which is new or empty. Returns the name
    of its class. Raises UserError, and then leaves nothing."""
    import_transformers()
    if not is_from_run(source):
        raise UserError(f"export: must be a run directory or a checkpoint in one, got {source}")
    pretrained = read_pretrained(source)
    tokenizer, model = tokenizer_of(source, pretrained), build_pretrained(pretrained)
    name = os.path.basename(os.path.abspath(run_of(source)))
    parameters = sum(p.numel() for p in model.parameters())
    unfinished, _ = claim_folder(f"{folder.rstrip(os.sep)}.unfinished")
    try:
        keep_tokenizer(tokenizer, unfinished, model.config.context)
        family, config = write_proven(model, unfinished, tokenizer.eot)
        text = card(name, pretrained.checkpoint, pretrained.settings, config.vocab_size, parameters,
                    family.model_class)
        write_text(os.path.join(unfinished, "README.md"), text)
        os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"to: cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return family.model_class


def write_proven(model, folder, eot):
    """write_model(), after which transformers has computed the same logits from the files: for the model and,
    before that, for a copy whose weights hide nothing. Raises UserError, and OSError."""
    try:
        for candidate in (with_large_weights(model), model):
            family, config = write_model(candidate, folder, eot)
            check_same_logits(candidate, folder, family)
    except UserError as error:
        raise UserError(f"export: {error}") from None
    return family, config


def main(argv):
    if asks_for_help(argv):
        print(__doc__)
        sys.exit()
    folders = [word.removeprefix("--to=") for word in argv if word.startswith("--to=")]
    sources = [word for word in argv if not word.startswith("-")]
    if len(sources) != 1 or len(folders) != 1 or len(argv) != 2 or not folders[0]:
        raise UserError(f"export: must be given RUN_DIR --to=DIR, got {' '.join(argv) or 'nothing'}")
    [source], [folder] = sources, folders
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"to must be a new or empty folder, got {folder}")
    architecture = export(source, folder)
    print(f"{folder}: {architecture}, for transformers' AutoModelForCausalLM and AutoTokenizer")


if __name__ == "__main__":
    run_cli(main)
