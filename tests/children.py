"""What the processes of tests/processes.py do. Importing this module imports no torch."""

import json
import os
import resource
import runpy
import signal
import sys
import time

import configure


def enter(function, arguments, output_paths, environment, folder):
    """How each process begins: folder, environment, stdout and stderr; then function(*arguments)."""
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in enumerate(output_paths, start=1):  # 1, 2: stdout, stderr
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    function(*arguments)


def run_train(words):
    """What `python train.py WORDS` does."""
    import train
    import training.log
    configure.SECONDS_FOR_RANK_0 = 0  # no torchrun ends what waits for it
    training.log.draw_loss = lambda rows, name: b""  # as in conftest.py
    sys.argv = ["train.py", *words]
    configure.run_cli(train.main)


def run_command(name, words):
    """What `python -m NAME WORDS` does."""
    sys.argv = [name, *words]
    sys.modules.pop(name, None)  # imported before the fork; runpy warns of it
    runpy.run_module(name, run_name="__main__")


def save_only(formats):
    """What may stand for matplotlib's Figure.savefig: it renders files that end in one of `formats`, such as
    (".png",), and leaves others empty, as to render one takes half a second."""
    from matplotlib.figure import Figure
    savefig = Figure.savefig

    def save(figure, path, **options):
        if path.endswith(formats):
            savefig(figure, path, **options)
        else:
            open(path, "w").close()

    return save


def run_notebook(source, printed, formats):
    """Run the cells of the notebook at `source` as a kernel of Jupyter would, and write what each printed to
    `printed`, as JSON: {number: text}. formats: as for save_only()."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from matplotlib.figure import Figure
    Figure.savefig = save_only(formats)
    sys.path.insert(0, "")
    shell, texts = InteractiveShell.instance(), {}
    with open(source) as file:
        cells = json.load(file)["cells"]
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            with capture_output() as output:
                result = shell.run_cell("".join(cell["source"]))
            result.raise_error()
            texts[i] = output.stdout
    with open(printed, "w") as file:
        json.dump(texts, file)


def run_train_on_a_small_disk(words, largest_file):
    """The same where no file can be larger than this many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    run_train(words)


def run_train_until_killed(words, name, calls):
    """The same, but killed with SIGKILL in place of its `calls`-th call of os.NAME."""
    original, count = getattr(os, name), 0

    def call(*arguments):
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, name, call)
    run_train(words)


def prepare_endless_text(data_dir):
    """Prepare a text that never ends, into `data_dir`; says "midway" when some of it is written."""
    from data import prepare

    def endless_documents(config):
        for i in range(10**9):
            if i == 1000:
                print("midway", flush=True)
                time.sleep(60)
            yield f"text {i}"

    prepare.BATCH_CHARS = 100
    prepare.documents = endless_documents
    prepare.prepare(configure.Config(tokenizer="bytes", data_dir=data_dir))


def hold_trial(folder, key):
    """Hold `key` of a folder of trials until killed."""
    from scaling.worker import Worker
    with Worker(folder) as worker:
        if worker.claim(key):
            open(os.path.join(folder, "held"), "w").close()
            signal.pause()


def claim_draws(folder, url, count):
    """Claim as many draws of a study in the database at `url` as nobody else claims, of `count`."""
    from scaling import study
    from scaling.worker import Worker
    with Worker(folder) as worker:
        shared = study.SharedStudy(study.open_storage(url), "search", worker, "{}")
        while shared.claim(map(str, range(count)), lambda key: ({}, {}, "{}")):
            pass


def hold_folder(path):
    """Lock the folder at `path`, for ever."""
    from training.run_dir import locked_folder
    with locked_folder(path):
        time.sleep(1000)


def fail_at_evaluation(calls, error):
    """Let the `calls`-th evaluation raise MemoryError, or be a kill."""
    import train
    original, count = train.evaluate, 0

    def evaluate(*arguments):
        nonlocal count
        count += 1
        if count == calls and error == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == calls:
            raise MemoryError
        return original(*arguments)

    train.evaluate = evaluate


def die_after_saves(count):
    """Be killed after `count` checkpoints were written as last.pt."""
    from training import run_dir
    original, saved = run_dir.write_checkpoint, 0

    def write_checkpoint(path, *arguments):
        nonlocal saved
        original(path, *arguments)
        saved += path.endswith("last.pt")
        if saved == count:
            os.kill(os.getpid(), signal.SIGKILL)

    run_dir.write_checkpoint = write_checkpoint


def step_by_factors():
    """Train by an optimizer whose state is not shaped like its parameters, as SOAP's and Shampoo's."""
    import torch

    import train
    from parametrization import param_groups
    from training.distributed import copy_into_shard, full_tensor

    class Factored(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    grad = full_tensor(p.grad)
                    matrix, state = grad.view(len(grad), -1), self.state[p]
                    if not state:
                        state |= {"count": 0, "factors": [torch.zeros(matrix.size(1), matrix.size(1)), None]}
                    state["count"] += 1
                    state["factors"][0] += matrix.T @ matrix
                    scale = state["factors"][0].trace().sqrt() / state["count"]
                    update = grad / (scale + 1e-6) * group["lr"]
                    if hasattr(p, "full_tensor"):
                        update = copy_into_shard(torch.empty_like(p), update)
                    p.sub_(update)

    train.build_optimizer = lambda model, capturable=False: Factored(param_groups(model), {})


def run_train_with(words, name, *arguments):
    """What `python train.py WORDS` does, after the function `name` of this module."""
    globals()[name](*arguments)
    run_train(words)
