"""Write a run as a Hugging Face model: python -m interop.export RUN_DIR --to=DIR

config.json and model.safetensors for a class of transformers that computes the same without code of ours,
tokenizer.json for its AutoTokenizer, and README.md, a model card. RUN_DIR stands for its best weights,
RUN_DIR/last.pt for the newest. transformers loads what was written, and unless its logits are those of our
model, nothing is kept.
"""

import json
import os
import shutil
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported; run_cli ends it

from configure import UserError, asks_for_help, describe_os_error, is_from_run, run_cli, run_of
from data.files import write_text
from data.tokenizer import keep_tokenizer
from interop.families import import_transformers
from interop.weights import check_same_logits, load_theirs, with_large_weights, write_model
from training.pretrained import build_pretrained, read_pretrained, tokenizer_of
from training.run_dir import claim_folder

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT of {parameters:,} parameters, {model_class} in transformers, after {step:,} training steps of
{batch_tokens:,} tokens. Validation loss: {val_loss}.

```
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = tokenizer("<|endoftext|>", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```

Text begins after an end of text, `<|endoftext|>`. Every multiplier of the parametrization
({parametrization}) is folded into the weights. Settings of the run:

```
{settings}
```
"""


def card(name, pretrained, model, family):
    """The model card of a run's checkpoint, in Markdown."""
    step, (_, _, history) = pretrained.checkpoint["step"], pretrained.checkpoint["past"]
    val_loss = "not evaluated"
    for row in history:
        if row["step"] <= step and "val_loss" in row:
            val_loss = (f"{row['val_loss']:.4f} nats per token, {row['val_bits_per_byte']:.4f} bits per "
                        f"byte, after step {row['step']:,}")
    config = model.config
    return CARD.format(
        name=name, parameters=sum(p.numel() for p in model.parameters()), model_class=family.model_class,
        step=step, batch_tokens=config.batch * config.context, val_loss=val_loss,
        parametrization=config.parametrization, settings=json.dumps(pretrained.settings, indent=1))


def export(source, folder):
    """Write the Hugging Face model of the run `source` into `folder`, which is new or empty. Returns the name
    of its class. Raises UserError, and then leaves nothing."""
    import_transformers()
    if not is_from_run(source):
        raise UserError(f"export: must be a run directory or a checkpoint in one, got {source}")
    pretrained = read_pretrained(source)
    tokenizer, model = tokenizer_of(source, pretrained), build_pretrained(pretrained)
    unfinished, _ = claim_folder(f"{folder.rstrip(os.sep)}.unfinished")
    try:
        keep_tokenizer(tokenizer, unfinished, model.config.context)
        for candidate in (with_large_weights(model), model):  # the first one's logits show every part
            family, fields = write_model(candidate, unfinished, tokenizer.eot)
            check_same_logits(candidate, load_theirs(unfinished, family, fields))
        name = os.path.basename(os.path.abspath(run_of(source)))
        write_text(os.path.join(unfinished, "README.md"), card(name, pretrained, model, family))
        os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"to: {describe_os_error(error, folder)}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return family.model_class


def main(argv):
    if asks_for_help(argv):
        print(__doc__)
        sys.exit()
    folders = [os.path.expanduser(word.removeprefix("--to=")) for word in argv if word.startswith("--to=")]
    sources = [os.path.expanduser(word) for word in argv if not word.startswith("-")]
    if len(sources) != 1 or len(folders) != 1 or len(argv) != 2 or not folders[0]:
        raise UserError(f"export: must be given RUN_DIR --to=DIR, got {' '.join(argv) or 'nothing'}")
    [source], [folder] = sources, folders
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"to must be a new or empty folder, got {folder}")
    model_class = export(source, folder)
    print(f"{folder}: {model_class}, for transformers' AutoModelForCausalLM and AutoTokenizer")


if __name__ == "__main__":
    run_cli(main)
