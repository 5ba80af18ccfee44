"""Train a GPT: `python train.py CONFIG.py [--name=value ...]`; `python train.py RUN_DIR` resumes a run.
`train(config)` is the same for scripts and notebooks; `--help` lists every setting."""

import contextlib
import math
import os
import signal
import sys
from dataclasses import dataclass, field

# Before torch: it rejects what torch would not survive
from configure import TRAIN_USAGE, Config, UserError, configure, run_cli, split_words

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported; run_cli ends it

import torch
from tqdm import tqdm

from data.datasets import would_read
from data.loader import TokenDataset, prefetch_batches, with_vocab_size
from data.prepare import find_prepared, is_prepared, prepare
from model import GPT
from parametrization import format_table, role_of
from training.checkpoint import folders_of, has_finite_weights, settings_of_checkpoint
from training.cli import catch_signals, chosen_run_dir, errors_in_one_line
from training.compile import compiled_training, use_cuda_graph
from training.device import (
    batches_on_device,
    check_memory,
    is_compiled,
    peak_flops,
    peak_memory,
    precision_name,
    reuse_freed_memory,
    select_device,
)
from training.distributed import any_rank, init_distributed, local_rank0_first, parallelize, rank, world_size
from training.evaluate import evaluate
from training.folder import OWN_FILES
from training.logger import RunLogger, own_run_dir
from training.metrics import MetricsBuffer, is_finite
from training.monitor import LossSpikeDetector, build_observers, divergence_message
from training.optimizer import build_optimizer, choose_update
from training.pretrained import check_same_function, load, load_pretrained, read_pretrained  # noqa: F401
from training.sample import BETWEEN, sample, sampling_config, write_samples
from training.schedule import decay_start, describe_more_steps
from training.step import TrainStep

READ_SECONDS = 0.5  # between two reads of the metrics, at the most
WARM_STEPS = 3  # after them the step is compiled, allocated and captured


@dataclass
class Result:
    """What train() returns. Losses are mean cross-entropies in nats a token, errors standard errors."""
    model: torch.nn.Module
    val_loss: float = math.nan
    val_error: float = math.nan  # over the evaluation windows
    val_bits_per_byte: float = math.nan
    best_val_loss: float = math.inf
    best_step: int = 0
    tokens_per_second: float = math.nan  # median; start, evaluations and checkpoints left out
    peak_memory: float = math.nan  # bytes that tensors took on the GPU
    diverged: bool = False  # and so ended early
    stopped: bool = False  # by a signal
    stopped_early: bool = False  # by `stop_early`
    history: list = field(default_factory=list)  # the rows of metrics.csv, as dicts
    sample: str = ""


@dataclass
class Run:
    """What a run works with: made once by set_up(), before the first step."""
    config: Config
    say: object  # prints a line; silent on all ranks but the first
    device: torch.device
    autocast: object  # the context manager that gives the precision
    dataset: TokenDataset
    model: GPT
    parallel_model: torch.nn.Module  # `model`, or a copy or a part of it on each rank
    optimizer: torch.optim.Optimizer
    logger: RunLogger
    checkpoint: dict | None  # where the run resumes from
    batches: object  # yields the batch of each step
    stop_early: dict = field(default_factory=dict)  # see train()

    @property
    def start(self):
        """Steps that were done before."""
        return self.checkpoint["step"] if self.checkpoint else 0


def set_up(config, say):
    """The Run of `config`: data prepared, model built, the last checkpoint loaded. Raises UserError."""
    device, autocast = select_device(config)
    use_cuda_graph(config, device)  # rejected now, rather than after the data is prepared
    reject_run_in_its_text(config)
    logger = RunLogger(config, say)
    checkpoint = logger.read_checkpoint()
    pretrained = None
    if config.init_from and checkpoint is None:
        pretrained = read_pretrained(config.init_from)
        check_same_function(config, pretrained)
        say(f"{pretrained.source}: its weights are where this run starts")
    with local_rank0_first():
        dataset = open_dataset(config, checkpoint, say)
    dataset.check_fills_batch(config.context, config.batch)
    # What the end of the run needs is rejected now, not after training
    dataset.validation_windows(config.context, config.eval_tokens)
    dataset.tokenizer.encode(config.prompt)
    sized_config = with_vocab_size(config, dataset)
    check_memory(sized_config, device, autocast)
    model = GPT(sized_config).to(device)
    if pretrained is not None:
        load_pretrained(pretrained, config, dataset, model)
    parallel_model = parallelize(model, config, device)
    optimizer = build_optimizer(model, capturable=use_cuda_graph(config, device))
    logger.load(checkpoint, dataset, model, optimizer)
    start = checkpoint["step"] if checkpoint else 0
    chunks = prefetch_batches(dataset, config, start, rank(), world_size(), pin_memory=device.type == "cuda")
    return Run(config, say, device, autocast, dataset, model, parallel_model, optimizer, logger, checkpoint,
               batches_on_device(chunks, device))


def reject_run_in_its_text(config):
    """Raises UserError where what the run writes would belong to what it reads: the next start would find
    another text."""
    for name in OWN_FILES if config.out and not is_prepared(config.dataset) else ():
        if would_read(config.dataset, os.path.join(config.out, name)):
            raise UserError(f"out: got {config.out}, which lies in the data set {config.dataset}, and "
                            f"{name} would be read as text; takes a folder outside of it")


def open_dataset(config, checkpoint, say):
    """The TokenDataset of `config`. A run that resumes from `checkpoint` goes on with the tokens it had where
    their text is gone, or is of another Python now. Raises UserError."""
    folder = None
    if checkpoint is not None:
        folder = find_prepared(checkpoint["tokens"], folders_of(config, checkpoint))
    if folder is None:
        return TokenDataset(prepare(config))
    if config.dataset == "stdlib":
        return TokenDataset(folder)
    try:
        return TokenDataset(prepare(config))
    except UserError as error:
        say(f"{error}; resuming on the tokens in {folder}")
        return TokenDataset(folder)


def describe(run):
    """What is about to be trained, for people."""
    config, dataset = run.config, run.dataset
    tokens = config.tokens_before(config.steps)
    parameters = sum(p.numel() for p in run.model.parameters())
    modes = f"{run.device}"
    if run.autocast._enabled:
        modes += ", bf16"
    if is_compiled(config, run.device):
        modes += ", compiled"
    if use_cuda_graph(config, run.device):
        modes += ", one CUDA graph a step"
    return (f"{dataset.folder}: {dataset.train_tokens:,} training tokens, vocabulary {dataset.vocab_size:,}\n"
            f"{parameters:,} parameters on {modes}; {describe_steps(config)}: "
            f"{dataset.describe_epochs(tokens)}, {run.model.flops_per_token() * tokens:.2e} FLOPs\n"
            f"{format_table(run.model)}")


def describe_steps(config):
    """How many steps of how many tokens, and which settings in tokens reach beyond them."""
    first, last = (config.stage(step).batch * config.context for step in (0, max(0, config.steps - 1)))
    text = f"{config.steps:,} steps of {first:,} tokens"
    if config.batch_ramp_tokens is not None:
        text = f"{config.steps:,} steps of {first:,} to {last:,} tokens"
    total = config.tokens_before(config.steps)
    lengths = {name: getattr(config, name) for name in ("batch_ramp_tokens", "warmup_tokens", "decay_tokens")}
    longer = [f"{name}={length:,}" for name, length in lengths.items() if (length or 0) > total]
    if longer:
        text += f" (they end at {total:,} tokens, before {', '.join(longer)})"
    return text


def is_due(every, step):
    """Whether something that happens each `every` steps (None: never) happens after `step` steps."""
    return every is not None and step % every == 0


def validate(run, result, step, row):
    """Evaluate after `step` steps: the numbers go into `result` and `row`, of metrics.csv. Returns `row` if
    the loss is not finite, else None."""
    # Whatever happens in the last evaluation, what was trained is on the disk
    saved_before = step == run.config.steps and (run.checkpoint is None or step > run.start)
    if saved_before:
        save(run, result, step, ["last.pt"])
    numbers = evaluate(run.model, run.dataset, run.config, run.device, run.autocast)
    for name, value in numbers.items():
        setattr(result, name, value)
    run.say(f"step {step:,}: validation loss {result.val_loss:.4f} ± {result.val_error:.4f}, "
            f"{result.val_bits_per_byte:.4f} bits per byte")
    row.update(numbers)
    if math.isfinite(result.val_loss):
        return None
    if saved_before:
        run.logger.take_back_last()
    return row


def measure_best_again(run):
    """The loss of best.pt on the validation windows of now; infinite where there is none."""
    found = math.inf
    if run.logger.load_best(run.model):
        found = evaluate(run.model, run.dataset, run.config, run.device, run.autocast)["val_loss"]
    run.logger.load(run.checkpoint, run.dataset, run.model, run.optimizer)
    return found


def find_divergence(run, rows, with_weights):
    """The first of `rows` that is not finite, or None. With the weights: it is the last where these are not,
    as the step after a finite loss can break them."""
    for row in rows:
        if not is_finite(row):
            return row
    broken = False
    if with_weights:
        [broken] = any_rank(not has_finite_weights(run.model))
    return rows[-1] if broken else None


def due_checkpoints(result, config, step, evaluating, saving):
    """best.pt where the evaluation is the best so far, last.pt where due, stable.pt before a decay."""
    names = []
    if evaluating and result.val_loss < result.best_val_loss:
        result.best_step, result.best_val_loss = step, result.val_loss
        names.append("best.pt")
    if saving:
        names.append("last.pt")
    if step == decay_start(config):
        names.append("stable.pt")
    return names


def saves_after(config, step):
    """Whether a checkpoint is due after `step` steps: at the end, before a decay, each checkpoint_every."""
    return step in (config.steps, decay_start(config)) or is_due(config.checkpoint_every, step)


def save(run, result, step, names):
    """Write checkpoints, of the state after `step` steps, under these names."""
    past = result.best_step, result.best_val_loss, result.history
    run.logger.save_checkpoints(names, step, past, run.dataset, run.model, run.optimizer)


def train(config, quiet=False, stop_early=None):
    """Train what `config` describes and return its Result. With config.out the run is kept there, and resumes
    from its last checkpoint when there is one. stop_early: {step: function}, each called after that step with
    the training losses so far, on every rank; where it returns True the run ends. Raises UserError."""
    quiet = quiet or rank() > 0
    with own_run_dir(config):
        run = set_up(config, say=(lambda text: None) if quiet else tqdm.write)
        run.stop_early = stop_early or {}
        result = Result(run.model)
        if run.checkpoint:
            recall(run, result)
        train_run(run, result, quiet)
    return result


def recall(run, result):
    """What `result` was when the run's checkpoint was written."""
    result.best_step, result.best_val_loss, result.history = run.checkpoint["past"]
    before = settings_of_checkpoint(run.checkpoint)
    eval_tokens = before["eval_tokens"]
    if eval_tokens != run.config.eval_tokens:  # losses on other windows cannot be compared
        result.best_val_loss = measure_best_again(run)
        run.say(f"eval_tokens: {run.config.eval_tokens} after {eval_tokens}; best.pt has a loss of "
                f"{result.best_val_loss:.4f} there")
    run.say(f"{run.config.out}: resuming at step {run.start:,}")
    if 0 < run.start < run.config.steps != before["steps"]:
        run.say(describe_more_steps(run.config, before["steps"], run.start))


def train_run(run, result, quiet):
    """Everything from the first step to the sample."""
    config = run.config
    observers = build_observers(run.model, config)
    columns = [column for observer in observers for column in observer.columns]
    run.logger.open(format_table(run.model), run.dataset.tokenizer, result.history, columns)
    run.say(describe(run))
    # Chosen before the model is compiled: its bf16 copies of the weights are compiled in
    update = choose_update(run.parallel_model, run.optimizer, config, run.autocast)
    with (contextlib.closing(run.logger),
          compiled_training(run.model, run.parallel_model, config, run.device, run.autocast, run.say)):
        train_step = TrainStep(run.parallel_model, run.optimizer, config, run.autocast,
                               use_cuda_graph(config, run.device), run.say, update, observers)
        metrics = MetricsBuffer(config.tokens_before, len([*run.model.parameters()]), columns)
        with (catch_signals() as signals,
              tqdm(total=config.steps, initial=run.start, disable=quiet) as progress):
            before_the_first_step(run, result, metrics)
            if not result.diverged:
                loop(run, result, train_step, metrics, signals, progress)
        update.close()
        finish(run, result, metrics)


def loop(run, result, train_step, metrics, signals, progress):
    """The training loop: from the first step, or where the run resumes, to the last. Fills `result`."""
    config, spikes = run.config, LossSpikeDetector(run.config.grad_clip, run.say)
    metrics.restart_clock()
    for step in range(run.start, config.steps):
        # The step itself. Its numbers stay on the device, which runs ahead of this loop
        lr = train_step.set_learning_rate(step)
        numbers = train_step(next(run.batches), step)
        metrics.record(step + 1, lr, numbers)

        # What follows it. Collective, so that all ranks do the same
        done = step + 1
        interrupted, overdue = any_rank(bool(signals), metrics.seconds_since_read() > READ_SECONDS)
        result.stopped = interrupted and done < config.steps
        evaluating = done == config.steps or is_due(config.eval_every, done)
        saving = result.stopped or saves_after(config, done)
        warm = done == run.start + WARM_STEPS
        if not (evaluating or saving or overdue or warm or done in run.stop_early):
            continue

        # Wait for the numbers of all steps since the last time, look for trouble, and evaluate
        rows = metrics.read()
        result.history += rows
        show_progress(progress, run, metrics, rows)
        if warm and done < config.steps:
            metrics.forget_speeds()
        bad_row = find_divergence(run, rows, evaluating or saving)
        if evaluating and bad_row is None:
            bad_row = validate(run, result, done, rows[-1])
        run.logger.log(rows)
        spikes.update(rows)
        if ends_here(run, result, bad_row, metrics, done):
            return

        # Only weights that are known to be sound are saved
        save(run, result, done, due_checkpoints(result, config, done, evaluating, saving))
        if result.stopped:
            return
        metrics.restart_clock()


def ends_here(run, result, bad_row, metrics, step):
    """Whether the run ends before its last step: where it diverged, or where `stop_early` says so."""
    if bad_row is not None:
        end_diverged(run, result, bad_row, metrics)
        return True
    if step in run.stop_early:
        losses = [row["train_loss"] for row in result.history if "train_loss" in row]
        result.stopped_early = run.stop_early[step](losses)
    return result.stopped_early


def before_the_first_step(run, result, metrics):
    """Evaluation and checkpoint at step 0 of a new run; for a finished one they are all that is done."""
    config, step = run.config, run.start
    finished = step == config.steps
    is_new = run.checkpoint is None
    evaluating = finished or is_new and is_due(config.eval_every, 0)
    saving = finished or is_new and is_due(config.checkpoint_every, 0)
    row = {"step": step, "tokens": config.tokens_before(step)}
    if evaluating and is_new:
        result.history.append(row)
    bad_row = find_divergence(run, [row], evaluating or saving)
    if evaluating and bad_row is None:
        bad_row = validate(run, result, step, row)
    if evaluating and is_new:
        run.logger.log([row])
    elif finished and "val_loss" not in result.history[-1]:  # killed just before its last evaluation
        result.history[-1].update(row)
        run.logger.write_history(result.history)
    if bad_row is not None:
        end_diverged(run, result, row, metrics)
        return
    save(run, result, step, due_checkpoints(result, config, step, evaluating, saving))


def show_progress(progress, run, metrics, rows):
    """The progress bar after `rows`, the newest rows of metrics.csv."""
    row, speed = rows[-1], metrics.speeds[-1]
    text = f"loss {row['train_loss']:.3f}, lr {row['lr']:.1e}, {speed:,.0f} tokens/s"
    peak = peak_flops(run.config, run.device)
    if peak is not None:
        text += f", MFU {speed * run.model.flops_per_token() / peak:.1%}"
    progress.set_postfix_str(text)
    progress.update(len(rows))


def end_diverged(run, result, row, metrics):
    """Mark the run as diverged, and say at which numbers."""
    result.diverged = True
    roles = [role_of(name) for name, _ in run.model.named_parameters()]
    run.say(divergence_message(row, roles, metrics.grad_norms, precision_name(run.autocast)))


def finish(run, result, metrics):
    """What a run measures of itself and writes at its end."""
    result.tokens_per_second = metrics.median_speed()
    result.peak_memory = peak_memory(run.device)
    if not (result.stopped or result.diverged):
        # Sharded models need every rank in each pass: no rank may end before the others
        stop = None if run.config.shard else run.dataset.eot
        result.sample = BETWEEN.join(write_samples(run.model, run.dataset.tokenizer, run.config, stop))
        run.logger.write_text("sample.txt", result.sample + "\n")


def main(argv):
    if not argv:
        print(TRAIN_USAGE, "`python train.py --help` lists every setting.", sep="\n", file=sys.stderr)
        return 2
    if asked := sampling_config(argv):
        sample(*asked)
        return 0
    config = configure(argv)
    init_distributed()
    reuse_freed_memory()
    for source in split_words(argv)[0]:
        starts_anew = os.path.isdir(source) and config.out != source and config.init_from is None
        if starts_anew and rank() == 0:
            print(f"{config.out}: a new run with the settings of {source}; --init_from={source} starts from "
                  "its weights")
    with chosen_run_dir(config, argv) as config, errors_in_one_line(config):
        result = train(config)
        if result.stopped:
            any_rank(False)  # rank 0 has written the checkpoint: srun may end all when the first one ends
    if result.diverged:
        return 1
    if rank() == 0 and result.stopped:
        print(f"{config.out}: stopped; `python train.py {config.out}` resumes it")
    elif rank() == 0:
        print(f"\n{result.sample}\n\n{config.out}: validation loss {result.val_loss:.4f} nats per token, "
              f"{result.val_bits_per_byte:.4f} bits per byte")
    return 130 if result.stopped else 0


if __name__ == "__main__":
    run_cli(main)
