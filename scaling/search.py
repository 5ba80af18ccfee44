"""Find a proxy's settings: python -m scaling search CONFIG [--trials=64] [--seeds=3] [--out=DIR]

Draws the settings that transfer (scaling/space.py) and trains a proxy with each draw: first those of CONFIG
itself, then 15 from all of the space, then where a model of the losses so far expects the most: a Gaussian
process (--sampler=gp) or Parzen trees (--sampler=tpe), both Optuna's. A draw whose training loss is above the
median of the others' at a third or two thirds of the steps is stopped there. In the end the leaders are
trained on other seeds too, as the best of many noisy trials looks better than it is, and the winner takes the
lr at the bottom of its own curve. Writes DIR/best.py, which is read after any configuration:

    python train.py config/target.py DIR/best.py

best.py has the data set, the block, the optimizer and all else that was searched with; the shape, the batch
and the number of steps stay the target's own.

--space=lr,zero_query      only these are drawn; lr:2**-9..2**-6 is a range of your own
--target=CONFIG            says what the search costs as a share of its training
--workers=2                processes on this machine; on others, the same command on the same folder joins in
--stack=8                  train 8 proxies at once, on a GPU; none of them is stopped before its end
--storage=URL --study=NAME keep the trials in any Optuna storage in place of DIR/study.log: sqlite:///FILE,
                           postgresql+psycopg2://...; optuna-dashboard shows either
--eval_tokens=N            validation tokens; by default at most half of what a trial trains on
After an interruption, the same command resumes, and tries again what failed. DIR/trials.csv has a row for
each trial.
"""

import contextlib
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace

from tqdm import tqdm

from configure import Config, UserError, check_setting, configure, names_in, read_settings
from data.files import write_text
from data.loader import TokenDataset, with_vocab_size
from data.prepare import prepare
from scaling.cli import command, parse_options, reject_unused, resumable
from scaling.fits import optimum
from scaling.space import SPACE, Range, at_edge, distributions, parse_space, to_config, to_params
from scaling.stack import check_stackable
from scaling.study import (
    STUDY_FILE,
    SharedStudy,
    importances,
    median_at,
    open_storage,
    storage_errors_in_one_line,
    suggest,
)
from scaling.sweep import (
    UNUSED,
    Trial,
    facts_of,
    say_failed,
    torchrun_rank,
    train_group,
    trial_configs,
)
from scaling.trials import (
    CURVE_POINTS,
    append_rows,
    find_row,
    has_failed,
    identity,
    read_results,
    settings_of,
)
from scaling.worker import PARENT, Worker, end_with_parent, pause
from training.device import reuse_freed_memory, use_sensible_threads
from training.model_size import model_size

SAMPLERS = ("gp", "tpe")
LEADERS = 5  # are trained on other seeds too
OCTAVES = -1, -1/2, 1/2, 1  # from the lr of the best, for the curve
CURVE_SEEDS = 2  # at each of them
MOST = {"trials": 100_000, "seeds": 1_000, "workers": 1_000}  # more is a typing error
LOOKS = 9, 17  # points of the training curve, of CURVE_POINTS, after which a draw may be stopped
REPORT_SECONDS = 20  # between two updates of best.py and the figure, at the least
# What best.py leaves to the target: its size, its batches, and how much of the text it reads
TARGETS_OWN = {"width", "depth", "head_dim", "kv_heads", "context", "vocab_size", "batch", "batch_start",
               "batch_ramp_tokens", "max_tokens", "init_from", "seed"}


def loss_of(row):
    """The validation loss of a trial, for comparison: infinite where it diverged or was stopped."""
    return math.inf if row["diverged"] else row["val_loss"]


def mean_and_error(losses):
    """(mean, standard error of the mean); the error is nan for one loss, and the mean infinite for none."""
    mean = sum(losses) / len(losses) if losses else math.inf
    if len(losses) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(losses) / math.sqrt(len(losses))


class Search:
    """One worker's part in a search: it draws, trains and reports, as do others on the same folder or
    storage. dataset: its TokenDataset. options: `trials`, `seeds`, `stack`, `sampler`, `study`. Raises
    UserError where the study is of another search."""

    def __init__(self, config, space, options, worker, storage, dataset):
        self.space, self.options, self.worker, self.dataset = space, options, worker, dataset
        self.config = trial_configs(config, {})[0]
        self.facts = facts_of(self.config, dataset)
        self.domains = distributions(space)
        self.open_studies(storage)
        self.reported, self.leaders, self.best = time.monotonic(), [], None

    def open_studies(self, storage):
        self.storage, name, settings = storage, self.options["study"], self.key_of(self.config)
        self.draws = SharedStudy(storage, name, self.worker, settings, self.domains)
        self.others = SharedStudy(storage, f"{name}, seeds and lr", self.worker, settings)

    def key_of(self, config):
        """The identity() of a trial of this search."""
        return identity(config, self.facts)

    def config_of(self, key):
        """The Config of an identity(). What changes no number is that of this worker."""
        return replace(self.config, **settings_of(key))

    # Draws

    def propose(self, key):
        """Params, distributions and settings of draw number `key`. `config` itself is the first."""
        if key == "0":
            return to_params(self.config, self.space), self.domains, self.key_of(self.config)
        params = suggest(self.draws, self.options["sampler"], self.config.seed, self.domains, int(key))
        return params, self.domains, self.key_of(to_config(self.config, params, self.space))

    def draw(self):
        """Trains all draws."""
        keys = [str(number) for number in range(self.options["trials"])]
        self.train_keys(self.draws, keys, self.propose, "draws")

    def stop_early(self):
        """{step: function} for train(): whether a draw is above the median of those that got there."""
        rows = list(self.draws.rows().values())
        looks = {}
        for point in LOOKS:
            step = round(point * self.config.steps / CURVE_POINTS)
            start = round((point - 1) * self.config.steps / CURVE_POINTS)
            median = median_at(rows, point - 1)
            if start < step and math.isfinite(median):
                looks[step] = functools.partial(is_above, median, start)
        return looks

    # Other trials, each known by its settings

    def rows_of(self, configs, what):
        """The rows of these Configs, trained by whoever shares the search; None for one that failed."""
        done = self.complete_rows()
        new = [config for config in dict.fromkeys(configs) if not find_row(done, self.key_of(config))]
        groups = [new]
        if self.options["stack"] > 1:  # models of one seed read one text, and run the code that is compiled
            seeds = sorted({config.seed for config in new})
            groups = [[config for config in new if config.seed == seed] for seed in seeds]
        for group in groups:
            keys = [self.key_of(config) for config in group]
            self.train_keys(self.others, keys, lambda key: ({}, {}, key), what)
        done = self.complete_rows()
        return [find_row(done, self.key_of(config)) for config in configs]

    def complete_rows(self):
        """{key: row} of all that was trained to its end, as a draw or later."""
        draws, others = self.rows()
        return {row["config"]: row for row in draws + others if not row["failure"]}

    def confirm(self):
        """The leaders on fresh seeds, and the lr of the best: fills `leaders` and `best`."""
        rows = sorted(self.draws.rows().values(), key=loss_of)
        leaders = [self.config_of(row["config"]) for row in rows[:LEADERS] if math.isfinite(loss_of(row))]
        if not leaders and self.failed():
            return  # which is said at the end
        if not leaders:
            raise UserError(f"search: all {len(rows)} trials diverged; try a smaller --lr, or a --space of "
                            "smaller rates")
        self.leaders = self.over_seeds(leaders, "leaders on other seeds")
        if not math.isfinite(self.leaders[0][0]):
            return  # none was confirmed
        self.best = self.leaders[0]
        if "lr" in self.space:
            self.tune_lr()

    def over_seeds(self, configs, what, seeds=None):
        """[(mean loss, its standard error, Config)] of each over fresh seeds, the lowest first."""
        seeds = seeds or self.options["seeds"]
        fresh = [self.config.seed + k for k in range(1, seeds + 1)]
        rows = self.rows_of([replace(config, seed=seed) for config in configs for seed in fresh], what)
        found = []
        for i, config in enumerate(configs):
            losses = [loss_of(row) for row in rows[i * seeds:(i + 1) * seeds] if row]
            found.append((*mean_and_error(losses), config))
        return sorted(found, key=lambda result: result[0])

    def tune_lr(self):
        """Moves the lr of `best` to the bottom of its own curve, if that is confirmed. Draws are far apart:
        one is seldom in the middle, where transfer costs least."""
        _, _, best = self.best
        seeds = min(CURVE_SEEDS, self.options["seeds"])
        around = [replace(best, lr=best.lr * 2**octave) for octave in OCTAVES]
        curve = self.over_seeds([best, *around], "curve of lr", seeds)
        losses = {config.lr: mean for mean, _, config in curve}
        bottom = optimum(losses)
        lr = float(2 ** bottom[0]) if bottom else min(losses, key=losses.get)
        tuned = self.over_seeds([replace(best, lr=lr)], "the best")
        self.best = min(tuned[0], self.best, key=lambda result: result[0])

    # Training

    def train_keys(self, study, keys, propose, what):
        """Trains the trials of `keys` that have no result yet, this worker's part of them. Returns when each
        has one, or has failed and is not tried again by another worker."""
        with tqdm(total=len(keys), desc=what, disable=torchrun_rank()[0] > 0) as bar:
            while True:
                claims = []
                while len(claims) < self.options["stack"] and (claim := study.claim(keys, propose)):
                    claims.append(claim)
                if claims:
                    self.train_claims(study, claims)
                finished = study.finished().keys() & set(keys)
                bar.update(len(finished) - bar.n)
                self.report_now_and_then()
                if finished | study.failed_keys() >= set(keys):
                    return
                if not claims:
                    pause()

    def train_claims(self, study, claims):
        """Trains what was claimed, as one stack, and records it in the study, then in trials.csv."""
        rows = {row["config"]: row for row in study.rows().values()}
        new = [Trial(key, replace(self.config_of(key), dataset=self.dataset.folder))
               for key in dict.fromkeys(claim.config for claim in claims) if not find_row(rows, key)]
        if new:
            stop_early = self.stop_early() if study is self.draws else None
            trained = train_group(new, self.options["stack"], stop_early)
            rows |= {row["config"]: row for row in trained}
            append_rows(self.worker.path, [row for row in trained if has_failed(row)])
        for claim in claims:
            row = find_row(rows, claim.config)
            curve = row["curve"] if study is self.draws else []
            study.finish(claim, row, {look: curve[look - 1] for look in LOOKS if look <= len(curve)})
        self.copy_rows()

    # Results

    def rows(self):
        """All rows: the draws in the order of their numbers, then the others."""
        draws = sorted(self.draws.rows().items(), key=lambda item: int(item[0]))
        return [row for _, row in draws], list(self.others.rows().values())

    def failed(self):
        """The rows of the trials that failed, and have no result by another worker."""
        return [study.failed[key] for study in (self.draws, self.others) for key in study.failed_keys()]

    def copy_rows(self):
        """Adds to trials.csv what the study has and it has not, by whichever worker it was trained."""
        draws, others = self.rows()
        with self.worker.holding("trials.csv"):
            known = read_results(self.worker.folder, stopped_early=True)
            missing = [row for row in draws + others if not find_row(known, row["config"])]
            append_rows(self.worker.path, missing)

    def report_now_and_then(self):
        """best.py, the table and the figure of what there is, so that a killed search leaves them too."""
        if torchrun_rank()[0] == 0 and time.monotonic() - self.reported > REPORT_SECONDS:
            self.reported = time.monotonic()
            self.report()

    def report(self):
        """Writes best.py, search.txt and search.png to the folder; returns the texts of the first two."""
        from scaling import figures
        draws, others = self.rows()
        lowest = min(draws, key=loss_of, default=None)
        if lowest is None or not math.isfinite(loss_of(lowest)):
            return "", ""
        best = self.best or (loss_of(lowest), math.nan, self.config_of(lowest["config"]))
        best_text = self.best_file(best, draws, others)
        report_text = self.format_report(best[2], draws, others)
        with self.worker.holding("report"):  # the same command, started twice, writes the same files
            write_text(os.path.join(self.worker.folder, "best.py"), best_text)
            write_text(os.path.join(self.worker.folder, "search.txt"), report_text)
            figures.draw_search(draws, others, best[0], self.worker.folder)
        return best_text, report_text

    def best_file(self, best, draws, others):
        """The text of best.py: how it was found, and all that the target takes from the proxy. What came from
        outside, as the name of a data set, stands there as a literal and nowhere else."""
        mean, error, config = best
        loss = f"{mean:.4f} on one seed"
        if self.best:
            loss = f"{mean:.4f} ± {error:.4f}, the mean of {self.options['seeds']} seeds that no draw used"
        if self.failed() or not self.best:
            loss += ": the search is not finished"
        lines = [f"# The best of {len(draws)} trials at width {config.width}, depth {config.depth}, "
                 f"{config.steps} steps of {config.batch}x{config.context} tokens.",
                 f"# Validation loss {loss}.",
                 f"# Found by scaling.search: sampler {self.options['sampler']}, seed {self.config.seed}, "
                 f"{len(draws)} draws and {len(others)} trials for seeds and lr, "
                 f"{spent_flops(draws + others):.2e} FLOPs."]
        for group in ("data", "function", "init", "optimizer", "training"):
            lines += ["", f"# {group.capitalize()}"]
            names = [name for name in names_in(group) if name not in TARGETS_OWN]
            lines += [f"{name} = {getattr(config, name)!r}" for name in names]
        return "\n".join(lines) + "\n"

    def format_report(self, best, draws, others):
        """What the search found, for people. best: a Config."""
        losses = [loss_of(row) for row in draws]
        finite = sorted(loss for loss in losses if math.isfinite(loss))
        stopped = sum(row["failure"].startswith("stopped early") for row in draws)
        lines = [f"{len(draws)} draws: best {finite[0]:.4f}, median {finite[len(finite) // 2]:.4f} of the "
                 f"{len(finite)} that were trained to the end; {stopped} stopped early, "
                 f"{len(draws) - len(finite) - stopped} diverged; {len(others)} more trials for seeds and lr"]
        if self.failed():
            lines.append(f"{len(self.failed())} trials failed, and are tried again by the same command")
        counts = [n for n in (1, 8, 16, 32, 64, 128, 256, 512) if n < len(draws)] + [len(draws)]
        reached = [f"{n}: {min(losses[:n]):.4f}" for n in counts]
        lines.append(f"best after so many draws: {', '.join(reached)}")
        if self.leaders:
            lines.append(f"leaders, mean of {self.options['seeds']} other seeds and its standard error:")
            for mean, error, config in self.leaders:
                lines.append(f"  {mean:.4f} ± {error:.4f}  {describe(config, self.space)}")
        edges = [f"{name} ({end})" for name, end in at_edge(best, self.space)]
        if edges:
            lines.append(f"at an edge of the space, so that better may lie beyond: {', '.join(edges)}")
        shares = importances(self.draws)
        if shares:
            lines.append("importance (PED-ANOVA: how much each decides whether a draw is among the best "
                         "tenth;\nwhat was settled early was hardly varied after, and looks less important "
                         "than it is):")
            lines += [f"  {name:22}{share:6.1%}" for name, share in shares.items()]
        return "\n".join(lines) + "\n"


def is_above(median, start, losses):
    """Whether the mean of `losses` from step `start` on is above the median of other trials'."""
    recent = losses[start:]
    return sum(recent) / len(recent) > median


def describe(config, space):
    """The settings that were drawn, on one line."""
    values = []
    for name in space:
        value = getattr(config, name)
        text = f"{value:.3g}" if isinstance(value, float) else value
        values.append(f"lr=2**{math.log2(value):.2f}" if name == "lr" else f"{name}={text}")
    return " ".join(values)


def spent_flops(rows):
    """Training FLOPs of all rows, of those that were stopped too."""
    return sum(row["flops"] for row in rows if math.isfinite(row["flops"]))


def format_cost(rows, config, target_name, target):
    """What the search took, and as a share of the target's training. target: {setting: value}"""
    spent = spent_flops(rows)
    if not target_name:
        return f"tuning took {spent:.2e} FLOPs"
    config = replace(config, **target)
    size = model_size(with_vocab_size(config, TokenDataset(prepare(config))))
    flops = size.flops_per_token * config.tokens_before(config.steps)
    return f"tuning took {spent:.2e} FLOPs, {spent / flops:.1%} of one training of {target_name}, {flops:.2e}"


def read_target(path):
    """{setting: value} of the configuration at `path`; empty without one. It trains on the proxy's data, for
    as many steps, unless its file says otherwise. Raises UserError."""
    if not path:
        return {}
    return {name: check_setting(name, value, f"{path}: ") for name, value in read_settings(path).items()}


def check_search(config, space, options):
    """Raises UserError for a search that cannot be made, before it makes a folder."""
    if options["sampler"] not in SAMPLERS:
        raise UserError(f"sampler must be {' or '.join(SAMPLERS)}, got {options['sampler']}")
    for name, most in MOST.items():
        if options.get(name, 1) > most:
            raise UserError(f"{name} must be at most {most:,}, got {options[name]}")
    if options["stack"] > 1:
        check_stackable([config])
    if "warmup" in space and config.warmup_tokens is not None:
        raise UserError("space must not contain warmup, as warmup_tokens is set to "
                        f"{config.warmup_tokens}; try --warmup_tokens=none")
    if not any(isinstance(domain, Range) for domain in space.values()):
        raise UserError("space must contain a setting that has a range; combinations of choices are a sweep: "
                        "python -m scaling sweep CONFIG zero_query=true,false schedule=cosine,linear")


def with_brief_evaluation(config):
    """`config`, evaluated on at most half the tokens that a trial trains on, where eval_tokens is not set
    to something of its own: a trial of 60 small steps would spend half its time on being measured."""
    if config.eval_tokens != Config.eval_tokens:
        return config
    windows = max(1, config.tokens_before(config.steps) // 2 // config.context)
    return replace(config, eval_tokens=min(config.eval_tokens, windows * config.context))


@contextlib.contextmanager
def worker_processes(argv, count):
    """Within, `count` - 1 more processes of this search work on this machine, and print nothing but errors.
    At the end they are waited for; where this process is stopped, so are they."""
    cores = max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {PARENT: str(os.getpid()), "OMP_NUM_THREADS": str(cores)}
    if count > 1:
        import torch
        torch.set_num_threads(cores)
    processes = [subprocess.Popen([sys.executable, "-m", "scaling", "search", *argv, "--workers=1"],
                                  env=environment, stdout=subprocess.DEVNULL) for _ in range(count - 1)]
    try:
        yield
    except BaseException:
        end_workers(processes)
        raise
    finally:
        for process in processes:
            process.wait()


def end_workers(processes, patience=10.0):
    """Sends SIGTERM every `patience` seconds until each has ended. It raises KeyboardInterrupt there, which
    Python drops where it falls into a finalizer."""
    for process in processes:
        process.terminate()
    for process in processes:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
            process.terminate()


def storage_place(options):
    """Where the trials are kept: the URL of a database, or the file of a journal."""
    path = options["storage"].removeprefix("journal:").removeprefix("//")
    return path or os.path.join(options["out"], STUDY_FILE)


def run_search(config, space, options):
    """(the finished Search, the texts of best.py and of its report). Raises UserError, and KeyboardInterrupt
    when a signal stops it."""
    check_search(config, space, options)
    dataset = TokenDataset(prepare(config))
    dataset.check_fills_batch(config.context, config.batch)
    dataset.validation_windows(config.context, config.eval_tokens)
    where, storage = storage_place(options), None
    if options["storage"]:
        storage = open_storage(where)  # one that does not answer leaves no folder
    with Worker(options["out"]) as worker:
        storage = storage or open_storage(where)
        with storage_errors_in_one_line(storage, where):
            search = Search(config, space, options, worker, storage, dataset)
            try:
                search.draw()
                search.confirm()
            except KeyboardInterrupt:
                if torchrun_rank()[0] == 0:
                    search.open_studies(open_storage(where))  # the signal may have come while it was read
                    search.report()
                raise
            search.copy_rows()
            return search, *search.report()


def print_result(search, best_text, report_text, config, target):
    """What the command prints at its end; returns its exit code. target: what read_target() returns."""
    options = search.options
    with storage_errors_in_one_line(search.storage, storage_place(options)):
        (draws, others), failed = search.rows(), search.failed()
    if best_text:
        print(f"{options['out']}/best.py:\n{best_text}\n{report_text}"
              f"{format_cost(draws + others, config, options['target'], target)}")
    return say_failed(options["out"], failed, len(draws + others + failed))


@command
def main(argv):
    defaults = {"trials": 64, "seeds": 3, "out": "out/search", "stack": 1, "space": ",".join(SPACE),
                "target": "", "sampler": "gp", "storage": "", "study": "search", "workers": 1}
    end_with_parent()
    options, _, words = parse_options(argv, defaults, __doc__)
    reject_unused(words, UNUSED, "a search")
    config = with_brief_evaluation(configure(words))
    space, target = parse_space(options["space"]), read_target(options["target"])
    rank, _ = torchrun_rank()
    check_search(config, space, options)  # before the other workers start
    reuse_freed_memory()
    with resumable(options["out"]), worker_processes(argv, options["workers"]):
        use_sensible_threads(config)
        found = run_search(config, space, options)
    if rank > 0:
        return 0
    return print_result(*found, config, target)
