"""Find the settings of a large model on a small one: python -m scaling search --target=config/target.py

The target is that file and the --name=value settings after it. The search trains its proxy: the same model,
text, batch, context and steps, of the base width and depth. It prints first what it will train, what that
costs, and what of it transfers to the target. Then it

1. draws settings (scaling/space.py) and trains the proxy with each: first the target's own settings, this
   project's presets and the defaults; then settings from all of the space; then those of which a model of the
   losses so far expects the most. A draw whose training loss is above the median of the others' at a third or
   two thirds of the steps is stopped. If the best lies at an end of a range, that range is widened, once.
2. trains the best few on other seeds, as the best of many noisy trials looks better than it is, and moves the
   lr of the winner to the bottom of its own curve, which is extended while it falls to an end.
3. trains the best few, the presets and the defaults at a larger width, between the proxy and the target.
   Their order there decides; if it is not the proxy's, it says so. It forecasts the target's loss.

It writes out/search/best.py, for the target: data, block, optimizer and all settings that transfer. The size,
batch and number of steps stay the target's own.

    python train.py config/target.py out/search/best.py

--plan                     print the plan, time a few steps of each size, and stop
--trials=64 --seeds=3      draws, of the proxy; seeds of what is compared at the end
--proxy_width=, --proxy_depth=   a proxy of another shape than the base shape
--proxy=steps:300,context:256    let the proxy differ in more; the plan says what is known about that
--verify=false             train at no larger size; --verify_width=512 chooses its width
--space=lr,zero_query      only these are drawn; lr:2**-9..2**-6 is a range of your own
--sampler=gp               a Gaussian process, or tpe: Parzen trees; both are Optuna's
--workers=2                processes on this machine; on others, the same command on the same folder joins in
--stack=8                  train 8 proxies at once, on a GPU; none of them is stopped before its end
--out=out/search           the folder; the trials are in its study.log, which optuna-dashboard shows
--storage=URL --study=NAME keep them in any Optuna storage instead: sqlite:///FILE, postgresql+psycopg2://...
--eval_tokens=N            validation tokens; by default at most half of what a trial trains on

With a configuration, `search config/proxy.py [--target=config/target.py]`, that is the proxy, as it is.
After an interruption, the same command resumes, and tries again what failed. trials.csv (and trials-1.csv,
... of more processes) has a row for each trial, search.txt what was found.
"""

import contextlib
import functools
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

from tqdm import tqdm

from configure import TUNED, Config, UserError, check_setting, configure, read_settings, split_words
from data.files import write_text
from data.loader import TokenDataset
from data.prepare import prepare
from scaling import figures, plan, search_report
from scaling.cli import command, parse_options, reject_unused, resumable
from scaling.fits import lowest_end, mean_and_error, optimum
from scaling.rows import loss_of
from scaling.space import (
    Range,
    defaults_for,
    distributions,
    lr_ratio,
    parse_space,
    presets_for,
    starting_points,
    to_config,
    to_params,
    trains_alike,
    widened,
)
from scaling.stack import check_stackable
from scaling.study import (
    STUDY_FILE,
    SharedStudy,
    find_other,
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
    complete_rows,
    find_row,
    has_failed,
    identity,
    read_results,
    say_present,
    settings_of,
)
from scaling.verify import (
    OWN_SETTINGS,
    as_target,
    count_at_proxy,
    count_trainings,
    size_below,
    sizes_between,
    verify,
)
from scaling.worker import PARENT, Worker, end_with_parent, pause
from training.device import reuse_freed_memory, use_sensible_threads

SAMPLERS = ("gp", "tpe")
# The best draws race: (how many of them are left, seeds that each has had then)
RACE = (5, 1), (3, 2), (2, math.inf)
VERIFIED = 3  # leaders that are trained at a larger width
MORE_DRAWS = 4  # a quarter of the trials, where a range was widened
OCTAVES = -1, -1/2, 1/2, 1  # from the lr of the best, for the curve
FURTHER = 3  # octaves that the curve is extended by at most, while its lowest loss is at an end of it
CURVE_SEEDS = 2  # at each of them
MOST = {"trials": 100_000, "seeds": 1_000, "workers": 1_000}  # more is a typing error
LOOKS = 9, 17  # points of the training curve, of CURVE_POINTS, after which a draw may be stopped
REPORT_SECONDS = 20  # between two updates of best.py and the figure, at the least


class NotTrained(Exception):
    """A search that is not to train any more lacks a row."""


class Search:
    """One worker's part in a search: it draws, trains and reports, as do others on the same folder or
    storage. dataset: its TokenDataset. options: `trials`, `seeds`, `stack`, `sampler`, `study`. target: a
    Config, or None; sizes: [(width, depth)] at which to verify. Raises UserError where the study is of
    another search."""

    def __init__(self, config, space, options, worker, storage, dataset, target=None, sizes=()):
        self.space, self.options, self.worker, self.dataset = space, options, worker, dataset
        self.target, self.sizes = target, sizes
        self.config = trial_configs(config, {})[0]
        self.facts = {}  # of each size_of()
        self.starts = starting_points(self.config, space)
        self.first_domains = self.domains = distributions(space)
        self.open_studies(storage)
        self.widened = {}
        self.use_widened()
        self.reported, self.leaders, self.best, self.verification = time.monotonic(), [], None, None
        self.lr_curve = {}  # {lr: mean loss}, of tune_lr()
        self.trains = True

    def open_studies(self, storage):
        self.storage, name, settings = storage, self.options["study"], self.key_of(self.config)
        target = self.options.get("target", "")
        self.draws = SharedStudy(storage, name, self.worker, settings, self.first_domains, target)
        self.others = SharedStudy(storage, f"{name}, seeds and lr", self.worker, settings)

    def key_of(self, config):
        """The identity() of a trial of this search."""
        size = size_of(config)  # by which its precision may be chosen
        if size not in self.facts:
            self.facts[size] = facts_of(config, self.dataset)
        return identity(config, self.facts[size])

    def config_of(self, key):
        """The Config of an identity(). What changes no number is that of this worker."""
        return replace(self.config, **settings_of(key))

    # Draws

    def propose(self, key):
        """Params, distributions and settings of draw number `key`."""
        number = int(key)
        if number < len(self.starts):
            start = self.starts[number]
            return to_params(start, self.space), self.domains, self.key_of(start)
        params = suggest(self.draws, self.options["sampler"], self.config.seed, self.domains, number)
        return params, self.domains, self.key_of(to_config(self.config, params, self.space))

    def draw(self):
        """Trains all draws; some more where a range turns out to be too narrow."""
        trials = self.options["trials"]
        self.train_draws(trials)
        self.widen()
        if self.widened:
            self.train_draws(trials + trials // MORE_DRAWS)

    def train_draws(self, count):
        self.train_keys(self.draws, [str(number) for number in range(count)], self.propose, "draws")

    def widen(self):
        """Widens the ranges at an end of which the best draw lies, once in a study."""
        draws, _ = self.rows()
        if draws and not self.draws.widened():
            loss, _, best = self.lowest_draw(draws)
            wider = widened(self.space, best) if math.isfinite(loss) else {}
            if wider:
                print(f"the best draw lies at the end of a range, so it is widened, for more draws: "
                      f"{', '.join(wider)}")
                self.draws.widen({name: [domain.low, domain.high] for name, domain in wider.items()})
        self.use_widened()

    def use_widened(self):
        """Draws from the ranges that were widened, by this worker or another."""
        self.widened = self.draws.widened()
        ranges = {name: self.space[name]._replace(low=low, high=high)
                  for name, (low, high) in self.widened.items() if name in self.space}
        self.space = self.space | ranges
        self.domains = distributions(self.space)

    def lowest_draw(self, rows):
        """(loss, nan, Config) of the best of the draws `rows`, on the one seed of all."""
        lowest = min(rows, key=loss_of)
        return loss_of(lowest), math.nan, self.config_of(lowest["config"])

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
        """The rows of these Configs, trained by whoever shares the search; None for one that failed. Raises
        NotTrained where it is not to train, and one has no row."""
        done = self.complete_rows()
        new = [config for config in dict.fromkeys(configs) if not find_row(done, self.key_of(config))]
        if new and not self.trains:
            raise NotTrained
        groups = {}
        for config in new:  # models of one seed read one text, and those of one size fit into one stack
            kind = (*size_of(config), config.seed) if self.options["stack"] > 1 else None
            groups.setdefault(kind, []).append(config)
        for group in groups.values():
            keys = [self.key_of(config) for config in group]
            self.train_keys(self.others, keys, lambda key: ({}, {}, key), what)
        done = self.complete_rows()
        return [find_row(done, self.key_of(config)) for config in configs]

    def complete_rows(self):
        """{key: row} of all that was trained to its end, as a draw or later."""
        draws, others = self.rows()
        return complete_rows(draws + others)

    def confirm(self):
        """The leaders on fresh seeds, and the lr of the best: fills `leaders` and `best`."""
        rows = sorted(self.draws.rows().values(), key=loss_of)
        leaders = [self.config_of(row["config"]) for row in rows if math.isfinite(loss_of(row))]
        if not leaders and self.failed():
            return  # which is said at the end
        if not leaders:
            raise UserError(f"search: all {len(rows)} trials diverged; try a smaller --lr, or a --space of "
                            "smaller rates")
        self.leaders = self.race(leaders)
        if not math.isfinite(self.leaders[0][0]):
            return  # none was confirmed
        self.best = self.leaders[0]
        if "lr" in self.space:
            self.tune_lr()

    def race(self, configs):
        """over_seeds() of the leaders, the lowest first: those that look worse after a seed get no more."""
        ahead, behind = [(math.nan, math.nan, config) for config in configs[:RACE[0][0]]], []
        for count, seeds in RACE:
            behind = ahead[count:] + behind
            configs = [config for _, _, config in ahead[:count]]
            ahead = self.over_seeds(configs, "leaders on other seeds", min(seeds, self.options["seeds"]))
        return ahead + behind

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
        """Moves the lr of `best` to the bottom of its curve, if that is confirmed: draws are far apart. While
        the loss is lowest at an end of the curve, it gets another octave there, FURTHER times at most."""
        best, seeds = self.best[2], min(CURVE_SEEDS, self.options["seeds"])
        self.lr_curve, rates = {}, [best.lr * 2**octave for octave in (0, *OCTAVES)]
        for _ in range(1 + FURTHER):
            curve = self.over_seeds([replace(best, lr=lr) for lr in rates], "curve of lr", seeds)
            self.lr_curve |= {config.lr: mean for mean, _, config in curve}
            end = lowest_end(self.lr_curve)
            if end is None:
                break
            rates = [2 * end if end > best.lr else end / 2]
        bottom = optimum(self.lr_curve)
        lr = float(2 ** bottom[0]) if bottom else min(self.lr_curve, key=self.lr_curve.get)
        tuned = self.over_seeds([replace(best, lr=lr)], "the best")
        self.best = min(tuned[0], self.best, key=lambda result: result[0])

    def known(self):
        """[(name, Config)] of the settings that were there before the search."""
        changed = [name for name in TUNED if getattr(self.config, name) != getattr(self.target, name)]
        whose = f"the proxy's {OWN_SETTINGS}" if changed else f"your target's {OWN_SETTINGS}"
        own = [(whose, self.config), ("defaults", defaults_for(self.config))]
        return [*presets_for(self.config).items(), *own]

    def candidates(self):
        """[(name, Config)] of what is compared at a larger width, each once, with all of its names."""
        best, known = self.best[2], self.known()
        leaders = [best, *(config for mean, _, config in self.leaders[1:VERIFIED] if math.isfinite(mean))]
        named = [(f"leader {i}{at_another_lr(config, known)}", config)
                 for i, config in enumerate(leaders, start=1)]
        found = []
        for name, config in named + known:
            same = next((i for i, (_, other) in enumerate(found) if trains_alike(config, other)), None)
            if same is None:
                found.append((name, config))
            else:
                found[same] = f"{found[same][0]} = {name}", found[same][1]
        return found

    def verify(self):
        """The candidates at a larger width, whose order there decides: fills `verification` and `best`. With
        --verify=false by what an earlier verification has trained, if that is all."""
        if not self.sizes or self.best is None:
            return
        _, others = self.rows()
        self.trains = self.options["verify"]
        if not self.trains and all(row["width"] <= self.config.width for row in others):
            return
        try:
            found = verify(self, self.candidates(), self.target, self.sizes)
            [best] = self.over_seeds([found.best], "the verified best")
        except NotTrained:
            print("--verify=false: the verification is not finished, or was of other candidates; best.py "
                  "holds what was best at the proxy")
            return
        self.verification, self.best = found, best

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
        """Writes best.py, search.txt and the figures to the folder; returns the texts of the first two."""
        draws, others = self.rows()
        if not draws or not math.isfinite(min(map(loss_of, draws))):
            return "", ""
        best_text = search_report.format_best(self, draws, others)
        report_text = search_report.format_report(self, draws, others)
        loss = (self.best or self.lowest_draw(draws))[0]
        with self.worker.holding("report"):  # the same command, started twice, writes the same files
            write_text(os.path.join(self.worker.folder, "best.py"), best_text)
            write_text(os.path.join(self.worker.folder, "search.txt"), report_text)
            figures.draw_search(draws, others, loss, self.worker.folder)
            if self.verification:
                self.verification.draw(self.worker.folder)
        return best_text, report_text


def at_another_lr(config, known):
    """The end of a candidate's name, " = NAME at lr x 1.4", where but for its lr it is one of `known`, as
    Search.known() returns them; else nothing."""
    for name, other in known:
        ratio = lr_ratio(config, other)
        if ratio and not trains_alike(config, other):
            return f" = {name} at lr x {ratio:.3g}"
    return ""


def size_of(config):
    return config.width, config.depth, config.context, config.batch, config.steps


def is_above(median, start, losses):
    """Whether the mean of `losses` from step `start` on is above the median of other trials'."""
    recent = losses[start:]
    return sum(recent) / len(recent) > median


def proxy_and_target(options, words):
    """(the Config of the proxy, that of the target or None). Raises UserError."""
    sources, _ = split_words(words)
    changes = {name: options[name] for name in ("proxy", "proxy_width", "proxy_depth") if options[name]}
    if options["target"] and not sources:
        target = configure([options["target"], *words])
        proxy = plan.make_proxy(target, options["proxy_width"], options["proxy_depth"],
                                plan.parse_changes(options["proxy"]))
        if options["stack"] > 1:
            proxy = replace(proxy, micro_batch=None)
        return with_brief_evaluation(proxy), target
    if changes:
        raise UserError(f"{[*changes][0]} needs --target=CONFIG, and no other CONFIG, which would be the "
                        "proxy")
    config, target = configure(words), None
    if path := options["target"]:
        target = replace(config, **{name: check_setting(name, value, f"{path}: ")
                                    for name, value in read_settings(path).items()})
        smaller = target.width < config.width or target.depth < config.depth
        if smaller or not plan.differences(config, target):
            raise UserError(f"target must be larger than the proxy, {' '.join(sources)} ({config.width} x "
                            f"{config.depth}), got {path} ({target.width} x {target.depth}); for a search "
                            f"that makes the proxy itself, name no file but --target={path}")
    return with_brief_evaluation(config), target


def verification_sizes(config, target, options):
    """[(width, depth)] between the proxy and the target at which the candidates are trained too."""
    if target is None:
        return []
    return sizes_between(config, target, options["verify_width"] or None)


def planned_sizes(config, target, space, options):
    """[plan.Size]: the proxy and the sizes of the verification, each with the most trainings it can take."""
    seeds, trials = options["seeds"], options["trials"]
    race, last = 0, 0
    for count, seeds_then in RACE:
        race += count * (min(seeds_then, seeds) - last)
        last = min(seeds_then, seeds)
    at_proxy = {"draws": trials, "more if a range proves too narrow": trials // MORE_DRAWS,
                "of the best few on other seeds": race}
    if "lr" in space:
        curve_seeds = min(CURVE_SEEDS, seeds)
        at_proxy["for the lr of the best"] = len(OCTAVES) * curve_seeds + seeds
        at_proxy["more if its curve falls to an end"] = FURTHER * curve_seeds
    shapes, sizes = verification_sizes(config, target, options), []
    if shapes and options["verify"]:
        candidates = VERIFIED + len(presets_for(config)) + 2
        at_proxy["to compare with larger sizes"] = count_at_proxy(candidates) + seeds
        counts = count_trainings(shapes, candidates, seeds)
        purposes = ("to compare the candidates", "for the forecast")[:len(shapes)]
        for shape, count, purpose in zip(shapes, counts, purposes, strict=True):
            sizes.append(plan.Size("verify", as_target(config, target, *shape), {purpose: count}))
        if below := size_below(config, target):
            sizes.insert(0, plan.Size("smaller", as_target(config, target, *below), {"for the forecast": 2}))
    return [plan.Size("proxy", config, at_proxy), *sizes]


def check_search(config, space, options):
    """Raises UserError for a search that cannot be made, before it makes a folder."""
    if not config.steps:
        raise UserError("steps must be 1 or more for a search, got 0")
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
    processes = [subprocess.Popen([sys.executable, "-m", "scaling", "search", *argv], env=environment,
                                  stdout=subprocess.DEVNULL) for _ in range(count - 1)]
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


def open_dataset(config, target):
    """The TokenDataset of the proxy. Raises UserError where it is too short, for the verification too."""
    dataset = TokenDataset(prepare(config))
    for reader in (config, target) if target else (config,):
        dataset.check_fills_batch(reader.context, reader.batch)
        dataset.validation_windows(reader.context, config.eval_tokens)
    return dataset


def run_search(config, space, options, target=None):
    """(the finished Search, the texts of best.py and of its report). Raises UserError, and KeyboardInterrupt
    when a signal stops it."""
    check_search(config, space, options)
    dataset, sizes = open_dataset(config, target), verification_sizes(config, target, options)
    where, storage = storage_place(options), None
    if options["storage"]:
        storage = open_storage(where)  # one that does not answer leaves no folder
    with Worker(options["out"]) as worker:
        storage = storage or open_storage(where)
        with storage_errors_in_one_line(storage, where):
            search = Search(config, space, options, worker, storage, dataset, target, sizes)
            if torchrun_rank()[0] == 0:
                figures.load_pyplot()  # now: an import that a signal interrupts cannot always be repeated
                say_present(sum(search.rows(), []), worker.folder)
            try:
                search.draw()
                search.confirm()
                search.verify()
            except KeyboardInterrupt:
                if torchrun_rank()[0] == 0:
                    search.open_studies(open_storage(where))  # the signal may have come while it was read
                    search.report()
                raise
            search.copy_rows()
            return search, *search.report()


def find_other_search(config, space, options, dataset):
    """Which other search is where this one would be kept, for people; "" where none is. Writes nothing: with
    --plan, a database is not asked, as that makes its tables."""
    where = storage_place(options)
    is_database = "://" in where
    if is_database and options["plan"] or not is_database and not os.path.exists(where):
        return ""
    config = trial_configs(config, {})[0]
    settings = identity(config, facts_of(config, dataset))
    with storage_errors_in_one_line(storage := open_storage(where), where):
        other = find_other(storage, options["study"], settings, distributions(space))
    folder = where if options["storage"] else options["out"]
    return other and f"{folder} holds {other}"


def print_plan(config, target, space, options, dataset):
    """What is to be trained, what it costs and what transfers; with --plan, how long it takes, too."""
    sizes = planned_sizes(config, target, space, options)
    print(*plan.describe_plan(sizes, target, options["target"]), sep="\n")
    tokens = config.tokens_before(config.steps)
    print(f"text: {dataset.train_tokens:,} training tokens; a training of the proxy reads {tokens:,}: "
          f"{dataset.describe_epochs(tokens)}")
    if target is not None and len(sizes) == 1 and options["verify"]:
        print("no width lies between the proxy and the target: nothing is verified there")
    if options["plan"]:
        print(*plan.describe_time(sizes, target), sep="\n")


def print_result(search, best_text, report_text, words):
    """What the command prints at its end; returns its exit code. words: its settings."""
    options = search.options
    with storage_errors_in_one_line(search.storage, storage_place(options)):
        (draws, others), failed = search.rows(), search.failed()
    if best_text:
        print(f"{options['out']}/best.py:\n{best_text}\n{report_text}"
              f"{search_report.format_cost(search, draws + others)}")
    if best_text and search.target is not None:
        print(f"train the target: {search_report.next_command(options, words)}")
    return say_failed(options["out"], failed, len(draws + others + failed))


OPTIONS = {"trials": 64, "seeds": 3, "out": "out/search", "stack": 1, "space": "", "target": "", "proxy": "",
           "proxy_width": 0, "proxy_depth": 0, "verify": True, "verify_width": 0, "plan": False,
           "sampler": "gp", "storage": "", "study": "search", "workers": 1}


@command
def main(argv):
    is_worker = end_with_parent()
    options, _, words = parse_options(argv, OPTIONS, __doc__)
    workers = 1 if is_worker else options["workers"]
    reject_unused(words, UNUSED, "a search")
    config, target = proxy_and_target(options, words)
    space, (rank, _) = parse_space(options["space"], config), torchrun_rank()
    check_search(config, space, options)  # before the other workers start
    reuse_freed_memory()
    use_sensible_threads(config)
    dataset = open_dataset(config, target)
    other = find_other_search(config, space, options, dataset)
    advice = "--study=ANOTHER_NAME" if options["storage"] else "--out=ANOTHER_FOLDER"
    if other and not options["plan"]:
        missing = "" if target else "; or name the --target that it is for"
        raise UserError(f"out: {other}; add {advice}{missing}")
    if rank == 0:
        print_plan(config, target, space, options, dataset)
        if other:
            print(f"{other}: to run this one, add {advice}")
    if options["plan"]:
        return 0
    with resumable(options["out"]), worker_processes(argv, workers):
        found = run_search(config, space, options, target)
    return print_result(*found, words) if rank == 0 else 0
