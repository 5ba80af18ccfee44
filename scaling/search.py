"""Find a proxy's settings: python -m scaling.search CONFIG [--trials=64] [--seeds=3] [--out=DIR]

Draws the settings that transfer (scaling/space.py) and trains a proxy with each draw: first those of CONFIG
itself, then 15 from all of the space, then where a model of the losses so far expects the most: a Gaussian
process (--sampler=gp) or Parzen trees (--sampler=tpe), both Optuna's. A draw whose training loss is above the
median of the others' at a third or two thirds of the steps is stopped there. In the end the leaders are
trained on other seeds too, as the best of many noisy trials looks better than it is, and the winner takes the
lr at the bottom of its own curve. Writes DIR/best.py, which is read after any configuration:

    python train.py config/target.py DIR/best.py

--space=lr,zero_query      only these are drawn; lr:2**-9..2**-6 is a range of your own
--target=CONFIG            says what the search costs as a share of its training
--workers=2                processes on this machine; on others, the same command on the same folder joins in
--stack=8                  train 8 proxies at once, on a GPU; none of them is stopped before its end
--storage=URL --study=NAME keep the trials in any Optuna storage in place of DIR/study.log: sqlite:///FILE,
                           postgresql+psycopg2://...; optuna-dashboard shows either
--eval_tokens=N            validation tokens; by default at most half of what a trial trains on
After an interruption, the same command resumes, and tries again what failed.
"""

import functools
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

from tqdm import tqdm

from configure import TUNED, Config, UserError, check_setting, configure, read_settings
from data.files import write_text
from data.loader import TokenDataset, with_vocab_size
from data.prepare import prepare
from scaling.cli import command, parse_options
from scaling.fits import optimum
from scaling.space import SPACE, all_points, at_edge, distributions, parse_space, to_config, to_params
from scaling.stack import check_stackable
from scaling.study import (
    SharedStudy,
    importances,
    median_at,
    open_storage,
    storage_errors_in_one_line,
    suggest,
)
from scaling.sweep import Trial, facts_of, say_failed, say_stopped, torchrun_rank, train_group, trial_configs
from scaling.trials import CURVE_POINTS, append_rows, find_row, identity, read_results, settings_of
from scaling.worker import Worker, pause
from training.device import reuse_freed_memory
from training.model_size import model_size

SAMPLERS = ("gp", "tpe")
LEADERS = 5  # are trained on other seeds too
OCTAVES = -1, -1/2, 1/2, 1  # from the lr of the best, for the curve
CURVE_SEEDS = 2  # at each of them
LOOKS = 9, 17  # points of the training curve, of CURVE_POINTS, after which a draw may be stopped
REPORT_SECONDS = 20  # between two updates of best.py and the figure, at the least


def loss_of(row):
    """The validation loss of a trial, for comparison: infinite where it diverged or was stopped."""
    return math.inf if row["diverged"] else row["val_loss"]


def mean_and_error(losses):
    """(mean, standard error of the mean); the error is nan for one loss, and the mean infinite for none."""
    if not losses:
        return math.inf, math.nan
    mean = sum(losses) / len(losses)
    if len(losses) == 1 or not math.isfinite(mean):
        return mean, math.nan
    variance = sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    return mean, math.sqrt(variance / len(losses))


class Search:
    """One worker's part in a search: it draws, trains and reports, as do others on the same folder or
    storage. dataset: its TokenDataset. options: `trials`, `seeds`, `stack`, `sampler`, `storage`, `study`,
    `out`. Raises UserError."""

    def __init__(self, config, space, options, worker, storage, dataset):
        self.space, self.options, self.worker, self.dataset = space, options, worker, dataset
        self.config = trial_configs(config, {})[0]
        self.facts = facts_of(self.config, dataset)
        self.points = all_points(space)
        settings = self.key_of(self.config)
        self.draws = SharedStudy(storage, options["study"], worker, settings)
        self.others = SharedStudy(storage, f"{options['study']}, seeds and lr", worker, settings)
        self.reported, self.leaders, self.best = time.monotonic(), [], None

    def key_of(self, config):
        """The identity() of a trial of this search."""
        return identity(config, self.facts)

    def config_of(self, key):
        """The Config of an identity(). What changes no number is that of this worker."""
        return replace(self.config, **settings_of(key))

    # Draws

    def propose(self, key):
        """Params, distributions and settings of draw number `key`. `config` itself is the first."""
        domains = distributions(self.space)
        if key == "0":
            return to_params(self.config, self.space), domains, self.key_of(self.config)
        if self.points is not None:
            start = to_params(self.config, self.space)
            params = [point for point in self.points if point != start][int(key) - 1]
        else:
            params = suggest(self.draws, self.options["sampler"], self.config.seed, domains, int(key))
        return params, domains, self.key_of(to_config(self.config, params, self.space))

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
        done = {row["config"]: row for row in self.draws.rows().values() if not row["failure"]}
        done |= self.others.rows()
        new = [config for config in dict.fromkeys(configs) if not find_row(done, self.key_of(config))]
        groups = [new]
        if self.options["stack"] > 1:  # models of one seed read one text, and run the code that is compiled
            seeds = sorted({config.seed for config in new})
            groups = [[config for config in new if config.seed == seed] for seed in seeds]
        for group in groups:
            keys = [self.key_of(config) for config in group]
            self.train_keys(self.others, keys, lambda key: ({}, {}, key), what)
        done |= self.others.rows()
        return [find_row(done, self.key_of(config)) for config in configs]

    def confirm(self):
        """The leaders on fresh seeds, and the lr of the best: fills `leaders` and `best`."""
        rows = sorted(self.draws.rows().values(), key=loss_of)
        leaders = [self.config_of(row["config"]) for row in rows[:LEADERS] if math.isfinite(loss_of(row))]
        if not leaders and self.failed():
            return  # which is said at the end
        if not leaders:
            raise UserError(f"search: all {len(rows)} trials diverged; takes a smaller --lr, or a --space of "
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
        """Trains what was claimed, as one stack, and records it: in trials.csv, then in the study."""
        rows = read_results(self.worker.folder, stopped_early=study is self.draws)
        new = [Trial(key, replace(self.config_of(key), dataset=self.dataset.folder))
               for key in dict.fromkeys(claim.config for claim in claims) if not find_row(rows, key)]
        if new:
            stop_early = self.stop_early() if study is self.draws else None
            trained = train_group(new, self.options["stack"], stop_early)
            append_rows(self.worker.path, trained)
            rows |= {row["config"]: row for row in trained}
        for claim in claims:
            row = find_row(rows, claim.config)
            curve = row["curve"] if study is self.draws else []
            study.finish(claim, row, {look: curve[look - 1] for look in LOOKS if look <= len(curve)})

    # Results

    def rows(self):
        """All rows: the draws in the order of their numbers, then the others."""
        draws = sorted(self.draws.rows().items(), key=lambda item: int(item[0]))
        return [row for _, row in draws], list(self.others.rows().values())

    def failed(self):
        """The rows of the trials that failed, and have no result by another worker."""
        return [study.failed[key] for study in (self.draws, self.others) for key in study.failed_keys()]

    def report_now_and_then(self):
        """best.py, the table and the figure of what there is, so that a killed search leaves them too."""
        if torchrun_rank()[0] == 0 and time.monotonic() - self.reported > REPORT_SECONDS:
            self.reported = time.monotonic()
            self.report()

    def report(self):
        """Writes best.py, search.txt and search.png to the folder; returns the texts of the first two."""
        from scaling import figures
        draws, others = self.rows()
        finite = [row for row in draws if math.isfinite(loss_of(row))]
        if not finite:
            return "", ""
        lowest = min(finite, key=loss_of)
        best = self.best or (loss_of(lowest), math.nan, self.config_of(lowest["config"]))
        best_text = best_file(best, draws, others, self.options, self.best is not None, self.failed())
        report_text = self.format_report(best, draws, others)
        with self.worker.holding("report"):  # the same command, started twice, writes the same files
            write_text(os.path.join(self.worker.folder, "best.py"), best_text)
            write_text(os.path.join(self.worker.folder, "search.txt"), report_text)
            figures.draw_search(draws, others, best[0], self.worker.folder)
        return best_text, report_text

    def format_report(self, best, draws, others):
        """What the search found, for people."""
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
        edges = [f"{name} ({end})" for name, end in at_edge(best[2], self.space)]
        if edges:
            lines.append(f"at an edge of the space, so that better may lie beyond: {', '.join(edges)}")
        shares = importances(self.draws)
        if shares:
            lines.append("importance (PED-ANOVA: how much each decides whether a draw is among the best "
                         "tenth;\nwhat was settled early was hardly varied after, and looks less important "
                         "than it is):")
            lines += [f"  {name:22}{share:6.1%}" for name, share in shares.items()]
        return "\n".join(lines) + "\n"


def check_search(config, space, options):
    """Raises UserError for a search that cannot be made, before it makes a folder."""
    if options["sampler"] not in SAMPLERS:
        raise UserError(f"sampler: got {options['sampler']}, takes {' or '.join(SAMPLERS)}")
    if options["stack"] > 1:
        check_stackable([config])
    if "warmup" in space and config.warmup_tokens is not None:
        raise UserError(f"space: got warmup, which warmup_tokens={config.warmup_tokens} overrides; takes a "
                        "space without it, or --warmup_tokens=none")
    points = all_points(space)
    if points is not None and options["trials"] > len(points):
        raise UserError(f"trials: got {options['trials']}, takes {len(points)} or fewer with this space")


def with_brief_evaluation(config):
    """`config`, evaluated on at most half the tokens that a trial trains on, where eval_tokens is not set
    to something of its own: a trial of 60 small steps would spend half its time on being measured."""
    if config.eval_tokens != Config.eval_tokens:
        return config
    windows = max(1, config.tokens_before(config.steps) // 2 // config.context)
    return replace(config, eval_tokens=min(config.eval_tokens, windows * config.context))


def open_data(config):
    """The TokenDataset of a search. Raises UserError where no trial could train on it."""
    dataset = TokenDataset(prepare(config))
    dataset.check_fills_batch(config.context, config.batch)
    dataset.validation_windows(config.context, config.eval_tokens)
    return dataset


def is_above(median, start, losses):
    """Whether the mean of `losses` from step `start` on is above the median of other trials'."""
    recent = losses[start:]
    return sum(recent) / len(recent) > median


def describe(config, space):
    """The settings that were drawn, on one line."""
    values = []
    for name in space:
        value = getattr(config, name)
        if name == "lr":
            values.append(f"lr=2**{math.log2(value):.2f}")
        else:
            values.append(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(values)


def best_file(best, draws, others, options, confirmed, failed):
    """The text of best.py: every setting that transfers, drawn or not, and how it was found."""
    mean, error, config = best
    loss = f"{mean:.4f} on one seed"
    if confirmed:
        loss = f"{mean:.4f} ± {error:.4f}, the mean of {options['seeds']} seeds that no draw used"
    if failed or not confirmed:
        loss += ": the search is not finished"
    docstring = (f'"""The best of {len(draws)} trials at width {config.width}, depth {config.depth}, '
                 f"{config.steps} steps of {config.batch}x{config.context} tokens.\n\n"
                 f"Validation loss {loss}.\n"
                 f"Found by scaling.search: sampler {options['sampler']}, seed {options['seed']}, "
                 f"{len(draws)} draws and {len(others)} trials for seeds and lr, "
                 f"{spent_flops(draws + others):.2e} FLOPs;\n"
                 f'data set {config.dataset!r}, tokenizer {config.tokenizer!r}.\n"""\n\n')
    settings = [f"{name} = {value!r}\n" for name, value in vars(config).items()
                if name in TUNED or name == "optimizer"]
    return docstring + "".join(settings)


def spent_flops(rows):
    """Training FLOPs of all rows, of those that were stopped too."""
    return sum(row["flops"] for row in rows if math.isfinite(row["flops"]))


def training_flops(config):
    """FLOPs of one training run of `config`."""
    size = model_size(with_vocab_size(config, TokenDataset(prepare(config))))
    return size.flops_per_token * config.tokens_before(config.steps)


def format_cost(rows, config, target_name, target):
    """What the search took, and as a share of the target's training. target: {setting: value}"""
    spent = spent_flops(rows)
    text = f"tuning took {spent:.2e} FLOPs"
    if target_name:
        target_flops = training_flops(replace(config, **target))
        text += f", {spent / target_flops:.1%} of one training of {target_name}, {target_flops:.2e}"
    return text


def read_target(path):
    """{setting: value} of the configuration at `path`; empty without one. It trains on the proxy's data, for
    as many steps, unless its file says otherwise. Raises UserError."""
    if not path:
        return {}
    return {name: check_setting(name, value, f"{path}: ") for name, value in read_settings(path).items()}


def start_workers(argv, count):
    """`count` - 1 more processes of this search on this machine, which print nothing but errors."""
    cores = max(1, (os.cpu_count() or 1) // count)
    words = [word for word in argv if not word.startswith("--workers=")]
    processes = []
    for number in range(1, count):
        environment = {"RANK": str(number), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(cores)}
        processes.append(subprocess.Popen([sys.executable, "-m", "scaling.search", *words],
                                          env=os.environ | environment, stdout=subprocess.DEVNULL))
    if count > 1:
        import torch
        torch.set_num_threads(cores)
    return processes


def run_search(config, space, options):
    """(the finished Search, the texts of best.py and of its report). Raises UserError, and KeyboardInterrupt
    when a signal stops it."""
    check_search(config, space, options)
    dataset = open_data(config)
    storage = open_storage(options["storage"], options["out"]) if options["storage"] else None
    where = options["storage"] or options["out"]
    with storage_errors_in_one_line(where), Worker(options["out"]) as worker:
        if storage is None:
            storage = open_storage("", options["out"])  # a file in the folder, which is there now
        search = Search(config, space, options, worker, storage, dataset)
        try:
            search.draw()
            search.confirm()
        except KeyboardInterrupt:
            search.report()
            raise
        copy_rows(search)
        return search, *search.report()


def copy_rows(search):
    """Rows that workers in other folders trained are copied to this one's trials.csv."""
    draws, others = search.rows()
    known = read_results(search.worker.folder, stopped_early=True)
    missing = [row for row in draws + others if not find_row(known, row["config"])]
    if missing:
        append_rows(search.worker.path, missing)


@command
def main(argv):
    defaults = {"trials": 64, "seeds": 3, "out": "out/search", "stack": 1, "space": ",".join(SPACE),
                "target": "", "sampler": "gp", "storage": "", "study": "search", "workers": 1}
    options, _, words = parse_options(argv, defaults, __doc__)
    config = with_brief_evaluation(configure(words))
    space, target = parse_space(options["space"]), read_target(options["target"])
    options["seed"] = config.seed
    check_search(config, space, options)  # before the other workers start
    reuse_freed_memory()
    workers = start_workers(argv, options["workers"])
    try:
        search, best_text, report_text = run_search(config, space, options)
    except KeyboardInterrupt:
        return say_stopped(options["out"])
    finally:
        for process in workers:
            process.wait()
    if torchrun_rank()[0] > 0:
        return 0
    draws, others = search.rows()
    if best_text:
        print(f"{options['out']}/best.py:\n{best_text}\n{report_text}"
              f"{format_cost(draws + others, config, options['target'], target)}")
    failed = search.failed()
    return say_failed(options["out"], failed, len(draws + others + failed))
