"""Train a GPT: `python train.py CONFIG.py [--name=value ...]`; `python train.py RUN_DIR` resumes a run.
`train(config)` is the same for scripts and notebooks; `--help` lists every setting.

Read it from train_step(), one optimizer step, and loop(), which repeats it; set_up() makes what they use.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field

# Before torch: it rejects a deleted working directory, on which importing torch fails
from configure import TRAIN_USAGE, Config, UserError, configure, run_cli, split_words

if __name__ == "__main__":
    # No traceback while torch is imported; run_cli sets another handler
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from tqdm import tqdm

from data.datasets import would_read
from data.loader import TokenDataset, prefetch_batches, with_vocab_size
from data.prepare import find_prepared, is_prepared, prepare
from model import GPT
from parametrization import format_table, role_of
from training.checkpoint import folders_of, has_finite_weights, settings_of_checkpoint
from training.cli import (
    catch_signals,
    chosen_run_dir,
    describe_search,
    errors_in_one_line,
    reject_missing_target,
)
from training.compile import CudaGraphed, compiled_training, fall_back_or_raise, use_cuda_graph
from training.device import (
    batches_on_device,
    check_memory,
    is_compiled,
    peak_flops,
    peak_memory,
    precision_name,
    reuse_freed_memory,
    select_device,
    use_sensible_threads,
)
from training.distributed import (
    any_rank,
    init_distributed,
    local_rank0_first,
    mean_over_ranks,
    parallelize,
    rank,
    synchronize_gradients,
    world_size,
)
from training.evaluate import evaluate
from training.fused_step import fused_step
from training.log import RunLog, check_wandb
from training.metrics import MetricsBuffer, is_finite
from training.monitor import LossSpikeDetector, Watch, build_observers, divergence_message
from training.optimizer import build_optimizer, clip_gradients
from training.pretrained import check_same_function, load, load_pretrained, read_pretrained  # noqa: F401
from training.run_dir import OWN_FILES, RunDir, open_run_dir
from training.sample import BETWEEN, sample, sampling_config, write_samples
from training.schedule import LearningRate, decay_start, describe_more_steps

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left{postfix}"
READ_SECONDS = 0.5  # the metrics are read after a step that ends so long after the last read
LINE_SECONDS = 30  # between two lines of progress in a file, where there is no bar


@dataclass
class Result:
    """What train() returns. Losses are mean cross-entropies in nats per token."""
    model: torch.nn.Module
    val_loss: float = math.nan
    val_error: float = math.nan  # standard error over the evaluation windows
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
    """What a run works with, made before its first step."""
    config: Config
    say: object  # prints a line; silent on all ranks but the first
    device: torch.device
    autocast: object  # the context manager that gives the precision
    dataset: TokenDataset
    model: GPT
    parallel_model: torch.nn.Module  # `model`, or a copy or a part of it on each rank
    optimizer: torch.optim.Optimizer
    run_dir: RunDir
    start: int  # steps that were done before
    is_new: bool  # not resumed
    result: Result
    batches: object  # yields the batch of each step
    metrics: MetricsBuffer
    watch: Watch  # calls the observers
    log: RunLog | None = None
    stop_early: dict = field(default_factory=dict)  # see train()
    said: float = field(default_factory=time.monotonic)  # when show_progress() last printed a line


# The step and the loop

def train_step(model, optimizer, config, autocast, batch):
    """One optimizer step on `batch`, (2, micro-batches, B, T): tokens and their targets.

    Returns one tensor, not yet synchronized with the CPU: the mean loss, the gradient norm before clipping,
    and the norm of each parameter's gradient in the order of model.parameters(). On one GPU this is captured
    as a CUDA graph after two calls: no print, no .item(), no Python state. With --compile=model,
    training/fused_step.py does the same in its place: change both.
    """
    # Each micro-batch's loss has this weight, so that .grad sums up to the gradient of the mean loss
    micro_batches, losses = batch.size(1), []
    weight = torch.full((), 1 / micro_batches, device=batch.device)
    for i, (tokens_BT, targets_BT) in enumerate(zip(*batch, strict=True)):
        with synchronize_gradients(model, config, is_last=i == micro_batches - 1):
            with autocast:
                loss = model(tokens_BT, targets_BT)
            loss.backward(weight)
        losses.append(loss.detach())
    loss = mean_over_ranks(torch.stack(losses).mean())

    # Clip, update the weights, zero the gradients
    grad_norm, grad_norms = clip_gradients(model, config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat((torch.stack((loss, grad_norm)), grad_norms))


def loop(run, step_fn, learning_rate, signals, progress):
    """The training loop: from the first step, or where the run resumes, to the last. Fills run.result."""
    config, metrics, result = run.config, run.metrics, run.result
    spikes = LossSpikeDetector(config.grad_clip, run.say)
    metrics.restart_clock()
    for step in range(run.start, config.steps):
        # The step. Its numbers stay on the device, so that this loop can queue steps ahead of it
        done = step + 1
        batch = next(run.batches)
        lr = learning_rate.set(step)  # config.lr x schedule; each role's own is a fixed multiple of it
        run.watch.before_step(done, batch)
        seed_dropout(config, step)
        numbers = step_fn(batch)
        observed = run.watch.after_step(done, batch, grad_norms=numbers[2:])
        metrics.record(done, lr, numbers, observed)

        # Whether anything is due. All ranks decide alike, as what follows needs all of them
        interrupted, reading = any_rank(bool(signals), metrics.is_due(READ_SECONDS))
        result.stopped = interrupted and done < config.steps  # log_evaluate_save() then saves last.pt
        if not (reading or result.stopped or is_due_after(config, done) or done in run.stop_early):
            continue

        # What is due: read the numbers of all steps since the last time, log, evaluate, save
        rows = metrics.read()
        result.history += rows
        show_progress(progress, run, rows)
        spikes.update(rows)
        log_evaluate_save(run, done, rows)
        if done in run.stop_early and not result.diverged:
            losses = [row["train_loss"] for row in result.history if "train_loss" in row]
            result.stopped_early = run.stop_early[done](losses)
        if result.diverged or result.stopped or result.stopped_early:
            return
        metrics.restart_clock()


def log_evaluate_save(run, done, rows):
    """Log `rows`, the newest of metrics.csv, which end at `done` steps; evaluate and save what is due then. A
    run that diverged is marked, and nothing is saved once that is known."""
    config, result = run.config, run.result
    evaluating = evaluates_after(config, done)
    saving = saves_after(config, done) or result.stopped
    bad_row = find_divergence(run, done, rows, evaluating or saving)
    if bad_row is None and evaluating:
        if done == config.steps:  # whatever happens in the last evaluation, what was trained is on the disk
            save(run, done, ["last.pt"])
        rows[-1].update(validate(run, done))  # in result.history, too
        if not math.isfinite(result.val_loss):
            bad_row = rows[-1]
    run.log.write(rows)
    if bad_row is not None:
        end_diverged(run, bad_row)
        return

    names = []
    if evaluating and result.val_loss < result.best_val_loss:
        result.best_step, result.best_val_loss = done, result.val_loss
        names.append("best.pt")
    if saving:
        names.append("last.pt")
    if done == decay_start(config):
        names.append("stable.pt")
    save(run, done, names)


def is_due(every, step):
    """Whether `step`, a number of steps that are done, is a multiple of `every` (None: never)."""
    return every is not None and step % every == 0


def evaluates_after(config, done):
    return done == config.steps or is_due(config.eval_every, done)


def saves_after(config, done):
    return done in (config.steps, decay_start(config)) or is_due(config.checkpoint_every, done)


def is_due_after(config, done):
    return evaluates_after(config, done) or saves_after(config, done)


def seed_dropout(config, step):
    """Dropout depends on seed, step and rank alone, so that resuming needs no saved random state."""
    if config.dropout:
        torch.manual_seed(config.seed * 1_000_003 + step + 7919 * rank())


def find_divergence(run, done, rows, with_weights):
    """The first of `rows` that is not finite, or None. with_weights: the weights are checked as well, which a
    step can break after a finite loss; the last row is then returned."""
    for row in rows:
        if not is_finite(row):
            return row
    if with_weights and any_rank(not has_finite_weights(run.model))[0]:
        return rows[-1] if rows else {"step": done}
    return None


def validate(run, done):
    """Evaluate after `done` steps. Returns the numbers, which are also put into the result."""
    result = run.result
    numbers = evaluate(run.model, run.dataset, run.config, run.device, run.autocast)
    for name, value in numbers.items():
        setattr(result, name, value)
    run.say(f"step {done:,}: validation loss {result.val_loss:.4f} ± {result.val_error:.4f}, "
            f"{result.val_bits_per_byte:.4f} bits per byte")
    return numbers


def save(run, done, names):
    """Write checkpoints of the state after `done` steps under these names."""
    past = run.result.best_step, run.result.best_val_loss, run.result.history
    run.run_dir.save(names, done, past, run.dataset, run.model, run.optimizer)


def end_diverged(run, row):
    """Mark the run as diverged, and say at which numbers."""
    run.result.diverged = True
    roles = [role_of(name) for name, _ in run.model.named_parameters()]
    run.say(divergence_message(row, roles, run.metrics.grad_norms, precision_name(run.autocast)))


def show_progress(progress, run, rows):
    """The progress bar after `rows`, the newest rows of metrics.csv. Where the output is no terminal, as in a
    job's log, a line now and then."""
    row = rows[-1]
    speed = row["tokens_per_second"]
    text = f"loss {row['train_loss']:.3f}, lr {row['lr']:.1e}, {speed:,.0f} tokens/s"
    peak = peak_flops(run.config, run.device)
    if peak is not None:
        text += f", MFU {speed * run.model.flops_per_token() / peak:.1%}"
    progress.set_postfix_str(text)
    progress.update(len(rows))
    if progress.disable and time.monotonic() - run.said > LINE_SECONDS:
        run.said = time.monotonic()
        run.say(f"step {row['step']:,} of {run.config.steps:,}: {text}")


# A run from its start to its end

def train(config, quiet=False, stop_early=None):
    """Train what `config` describes and return its Result. With config.out the run is kept there, and resumes
    from its last checkpoint when there is one. stop_early: {step: function}, each called after that step with
    the training losses so far, on every rank; where it returns True the run ends. Raises UserError."""
    quiet = quiet or rank() > 0
    say = (lambda text: None) if quiet else tqdm.write
    with open_run_dir(config, say) as run_dir:
        run = set_up(config, run_dir, say)
        run.stop_early = stop_early or {}
        run_dir.begin(format_table(run.model), run.dataset.tokenizer)
        run.log = RunLog(run_dir, config, run.result.history)
        with contextlib.closing(run.log):
            say(describe(run))
            if run.is_new or run.start < config.steps:
                fit(run, quiet)
            else:
                evaluate_finished(run)
            finish(run)
    return run.result


def set_up(config, run_dir, say):
    """The Run of `config`: data prepared, model built, the last checkpoint loaded. Raises UserError."""
    device, autocast = select_device(config)
    use_cuda_graph(config, device)  # called for its error, before the data is prepared
    check_wandb(config)
    reject_run_in_its_text(config)
    checkpoint = run_dir.checkpoint_to_resume()
    if checkpoint is not None and checkpoint["step"] == config.steps:
        say(f"{config.out}: finished, after {config.steps:,} steps; `python train.py {config.out} "
            f"--prompt=TEXT` samples from it, `--steps={2 * config.steps or 1000}` trains it further")
    pretrained = None
    if config.init_from and checkpoint is None:
        pretrained = read_pretrained(config.init_from, say)
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
    start = checkpoint["step"] if checkpoint else 0
    batches = prefetch_batches(dataset, config, start, rank(), world_size(), pin_memory=device.type == "cuda")
    run = Run(config, say, device, autocast, dataset, model, parallel_model, optimizer, run_dir, start,
              checkpoint is None, Result(model), batches_on_device(batches, device),
              MetricsBuffer(config.tokens_before),
              Watch(build_observers(model, dataset, config), model, autocast))
    if checkpoint is not None:
        resume(run, checkpoint)
    return run


def resume(run, checkpoint):
    """Bring the run to where `checkpoint` was written. Its best loss is read from best.pt, which may be newer
    than the checkpoint."""
    best = run.run_dir.read_own("best.pt")
    if best is not None:
        run.result.best_step, run.result.best_val_loss, _ = best["past"]
        eval_tokens = settings_of_checkpoint(best)["eval_tokens"]
        if eval_tokens != run.config.eval_tokens:  # losses on other windows cannot be compared
            run.run_dir.load_best(best, run.model)
            numbers = evaluate(run.model, run.dataset, run.config, run.device, run.autocast)
            run.result.best_val_loss = numbers["val_loss"]
            run.say(f"eval_tokens: {run.config.eval_tokens} after {eval_tokens}; best.pt has a loss of "
                    f"{numbers['val_loss']:.4f} there")
    run.run_dir.load(checkpoint, run.dataset, run.model, run.optimizer)
    run.result.history = checkpoint["past"][2]
    if run.start < run.config.steps:
        run.say(f"{run.config.out}: resuming at step {run.start:,}")
    steps_before = settings_of_checkpoint(checkpoint)["steps"]
    if 0 < run.start < run.config.steps != steps_before:
        run.say(describe_more_steps(run.config, steps_before, run.start))


def reject_run_in_its_text(config):
    """Raises UserError where `out` lies in the data set, as the next start would read the run's files as
    text."""
    for name in OWN_FILES if config.out and not is_prepared(config.dataset) else ():
        if would_read(config.dataset, os.path.join(config.out, name)):
            raise UserError(f"out must lie outside of the data set {config.dataset}, got {config.out}: "
                            f"{name} would be read as text")


def open_dataset(config, checkpoint, say):
    """The TokenDataset of `config`. A run that resumes from `checkpoint` goes on with the tokens it had where
    their text is gone, or comes from another Python version. Raises UserError."""
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
    if run.device.type == "cpu":
        threads = torch.get_num_threads()
        modes += f", {threads} thread{'s' if threads > 1 else ''}"
    if use_cuda_graph(config, run.device):
        modes += ", one CUDA graph a step"
    return (f"{dataset.describe()}\n"
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


def fit(run, quiet):
    """Train from the first step, or from where the run resumes, to the last."""
    config, graph = run.config, use_cuda_graph(run.config, run.device)
    with contextlib.ExitStack() as during:
        # The step: train_step(), or with --compile=model its fused equivalent
        step_fn = functools.partial(train_step, run.parallel_model, run.optimizer, config, run.autocast)
        fused = during.enter_context(fused_step(run.model, run.optimizer, config, run.autocast))
        if run.start < config.steps:
            during.enter_context(compiled_training(run.model, run.parallel_model, config, run.device,
                                                   run.autocast, run.say))
        # Replayed as one CUDA graph where that is possible
        step_fn = CudaGraphed(fused or step_fn, graph,
                              lambda error: fall_back_or_raise("graph", config, error, run.say))
        learning_rate = LearningRate(run.optimizer, config, graph)
        # The first Ctrl-C or SIGTERM is put into this list: the loop then saves a checkpoint and returns
        signals = during.enter_context(catch_signals())
        progress = during.enter_context(tqdm(total=config.steps, initial=run.start, disable=quiet or None,
                                             bar_format=BAR))  # None: unless it is a terminal
        if run.is_new and is_due_after(config, 0):  # a new run is evaluated before its first step, too
            if evaluates_after(config, 0):
                run.result.history.append({"step": 0, "tokens": 0})
            log_evaluate_save(run, 0, run.result.history[:])
        if not run.result.diverged:
            loop(run, step_fn, learning_rate, signals, progress)


def evaluate_finished(run):
    """Evaluate a run that was finished before, as a kill may have prevented that."""
    row = run.result.history[-1]
    if "val_loss" not in row:
        log_evaluate_save(run, run.start, [row])
        run.log.rewrite()  # drops the row without the evaluation
        return
    validate(run, run.start)
    if not math.isfinite(run.result.val_loss):
        end_diverged(run, row)


def finish(run):
    """What a run measures of itself and writes at its end."""
    result = run.result
    run.model.eval()  # for whoever goes on to use it: without dropout
    run.log.draw()
    result.tokens_per_second = run.metrics.median_speed()
    result.peak_memory = peak_memory(run.device)
    if not (result.stopped or result.diverged):
        # Sharded models need every rank in each pass: no rank may end before the others
        stop = None if run.config.shard else run.dataset.eot
        result.sample = BETWEEN.join(write_samples(run.model, run.dataset.tokenizer, run.config, stop))
        run.run_dir.write_text("sample.txt", result.sample + "\n")


# The command line

def describe_files(out):
    """Where the sample of a finished run is and, where it was drawn, the picture of its loss."""
    files = os.path.join(out, "sample.txt")
    picture = os.path.join(out, "loss.png")
    if os.path.exists(picture):
        files += f", and its loss over the steps in {picture}"
    return f"This sample is in {files}"


def main(argv):
    if not argv:
        print(TRAIN_USAGE, "`python train.py --help` lists every setting.", sep="\n", file=sys.stderr)
        return 2
    if asked := sampling_config(argv):
        sample(*asked)
        return 0
    config = configure(argv)
    reject_missing_target(argv)
    init_distributed()
    reuse_freed_memory()
    use_sensible_threads(config)
    for line in describe_search(argv):
        if rank() == 0:
            print(line)
    for source in split_words(argv)[0]:
        starts_anew = os.path.isdir(source) and config.out != source and config.init_from is None
        if starts_anew and rank() == 0:
            print(f"{config.out}: a new run with the settings of {source}; --init_from={source} starts from "
                  "its weights")
    with chosen_run_dir(config, argv) as config, errors_in_one_line(config):
        result = train(config)
        if result.stopped:
            any_rank(False)  # a barrier, until rank 0 has written: srun may end all when the first one ends
    if result.diverged:
        return 1
    if rank() == 0 and result.stopped:
        print(f"{config.out}: stopped; `python train.py {config.out}` resumes it")
    elif rank() == 0:
        print(f"\n{result.sample}\n\n{describe_files(config.out)}\n{config.out}: validation loss "
              f"{result.val_loss:.4f} nats per token, {result.val_bits_per_byte:.4f} bits per byte")
    return 130 if result.stopped else 0


if __name__ == "__main__":
    run_cli(main)
