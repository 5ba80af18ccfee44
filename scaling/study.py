"""A search's trials in an Optuna study, which processes and machines share: each trial is trained once.

The study is the store of a search; trials.csv is copied from it. A trial of the study stands for a key: the
number of a draw, or the settings of a trial that confirms a result. Whoever trains it holds the lock of its
key in the folder (scaling/worker.py), and adds it as a running trial with all that is needed to train it
again; of two that add the same key at once, in folders that share only a database, the lower number wins. A
trial that failed, or whose worker died, is marked as failed, and its key is free again.
"""

import contextlib
import functools
import json
import math
import os
import re
import socket
import statistics
import time
from typing import NamedTuple

from configure import TUNED, UserError, complete_saved
from scaling.trials import FACTS, HASHES, complete_key, has_failed

STUDY_FILE = "study.log"
STARTUP = 16  # draws from all of the space before the sampler has something to learn from
CAP = 0.7  # quantile of the losses
LOST_AFTER = 600  # seconds; a trial on another machine is lost after 10 times the slowest, this at least
LOCKED_SECONDS = 300  # that a locked SQLite file is waited for
DIFFERENCES = 4  # settings that are named, of those in which two searches differ
TRIES = 20  # to make the tables of a new database, as others may be making them


class Claim(NamedTuple):
    """A trial that this worker is to train."""
    number: int  # in the study
    key: str
    config: str  # settings as JSON, scaling.trials.identity()
    lock: str  # what this worker holds meanwhile


@functools.cache
def load_optuna():
    """The module, silent. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("search needs Optuna: pip install -r requirements.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


# The storage

class JournalLock:
    """What Optuna holds while it appends to the journal: the kernel drops it when the process dies, and the
    half line that such a death leaves is cut off, which Optuna's own locks do not do."""

    def __init__(self, path):
        self.path = path

    def acquire(self):
        import fcntl
        self.file = open(f"{self.path}.lock", "ab")
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        size = os.path.getsize(self.path)
        with open(self.path, "r+b") as journal:
            journal.seek(max(0, size - 2**20))
            tail = journal.read()
            journal.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self):
        self.file.close()


@functools.cache
def journal_class():
    """Optuna's journal in a file, which also knows at which line it cannot be read."""
    class Journal(load_optuna().storages.journal.JournalFileBackend):
        line = None  # that is being read

        def read_logs(self, start):
            self.line = start + 1
            for log in super().read_logs(start):
                for name in ("row", "settings"):
                    json.loads(log.get("user_attr", {}).get(name, "{}"))
                yield log
                self.line += 1
            self.line = None

    return Journal


@contextlib.contextmanager
def storage_errors_in_one_line(storage, where):
    """Raises UserError where the `storage` that open_storage(where) returned fails, or is damaged."""
    kinds = [load_optuna().exceptions.StorageInternalError]
    with contextlib.suppress(ImportError):
        from sqlalchemy.exc import SQLAlchemyError
        kinds.append(SQLAlchemyError)
    try:
        yield
    except Exception as error:
        line = storage.journal.line if hasattr(storage, "journal") else None
        if isinstance(error, tuple(kinds)) or line is not None:
            raise storage_error(where, error, line) from None
        raise


def storage_error(where, error, line=None):
    if line is not None:
        return UserError(f"{where}: line {line} is damaged; restore the file, or remove that line and all "
                         "after it, whose trials are then trained again")
    reason = " ".join(str(error.__cause__ or error).split("\n[SQL")[0].split())[:200]
    return UserError(f"storage: {where} does not answer ({type(error).__name__}: {reason}); it must be "
                     "sqlite:///FILE, postgresql+psycopg2://... or journal:FILE (default: one in --out)")


def open_storage(where):
    """The Optuna storage at `where`: the URL of a database, or the file of a journal. Raises UserError."""
    optuna, journal = load_optuna(), None
    try:
        if "://" in where:
            return open_database(optuna, where)
        journal = journal_class()(where, lock_obj=JournalLock(where))
        storage = optuna.storages.JournalStorage(journal)
    except Exception as error:  # whatever a database driver raises, or a damaged journal
        raise storage_error(where, error, journal and journal.line) from None
    storage.journal = journal
    return storage


def open_database(optuna, url):
    """The storage in the database at `url`, whose tables are made if need be. Where several processes make
    them at once, all but one find that something exists already, and look again."""
    engine = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        engine["connect_args"] = {"timeout": LOCKED_SECONDS, "isolation_level": "IMMEDIATE"}
    for tries_left in reversed(range(TRIES)):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=engine)
        except Exception as error:
            made_by_another = re.search("exists|unique|duplicate", f"{error} {error.__cause__}".lower())
            if not made_by_another or tries_left == 0:
                raise
            time.sleep(0.05 + int.from_bytes(os.urandom(1), "big") / 1000)


# The study

class SharedStudy:
    """The study `name` of `storage`, for one worker of it (a scaling.worker.Worker). Raises UserError where
    it is of another search. settings: text of identity() that the study is of; None only reads it. space: the
    distributions that its trials are drawn from. target: the name of the search's target, for people."""

    def __init__(self, storage, name, worker, settings=None, space=None, target=""):
        self.optuna, self.worker = load_optuna(), worker
        self.failed = {}  # {key: row} of trials that failed here, and are not tried again by this worker
        self.study = self.optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        if other := describe_other(self.study, settings, space):
            raise UserError(f"out: the study {name!r} is of {other}; use another --out, or another --study "
                            "in the same storage")
        given = {"settings": settings, "space": space and describe_space(space), "target": target}
        for attribute, text in given.items():
            if text and attribute not in self.study.user_attrs:
                self.study.set_user_attr(attribute, text)

    def widened(self):
        """{setting: (low, high)} of the ranges that were widened; empty where none was. Raises UserError."""
        ranges = self.study.user_attrs.get("widened", {})
        try:
            return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"out: the study {self.study.study_name!r} is damaged: its widened ranges are "
                            f"{ranges!r:.80}; use another --out") from None

    def widen(self, ranges):
        """Keeps what widened() returns from now on."""
        self.study.set_user_attr("widened", ranges)

    def all_trials(self):
        """[(key, FrozenTrial)], the failed ones too, in the order of their numbers."""
        trials = self.study.get_trials(deepcopy=False)
        return [(complete_key(trial.user_attrs["key"]), trial) for trial in trials]

    def trials(self):
        """{key: FrozenTrial} of all trials but the failed ones."""
        found = {}
        for key, trial in self.all_trials():
            if trial.state != self.optuna.trial.TrialState.FAIL:
                found.setdefault(key, trial)
        return found

    def finished(self):
        """{key: FrozenTrial} of those that have a result."""
        return {key: trial for key, trial in self.trials().items() if trial.state.is_finished()}

    def failed_keys(self):
        """The keys of the trials that failed here, and that no other worker tries again."""
        return self.failed.keys() - self.trials().keys()

    def claim(self, keys, propose):
        """A Claim to the first of `keys` that nobody has; None when there is none. propose(key): params,
        distributions and settings of its trial, unless an earlier worker has proposed them."""
        self.release_lost()
        taken = self.trials().keys() | self.failed.keys()
        for key in keys:
            lock = f"{self.study.study_name}: {key}"
            if key in taken or not self.worker.claim(lock):
                continue
            if claim := self.add(key, lock, propose):
                return claim
            self.worker.release(lock)  # another was faster
        return None

    def add(self, key, lock, propose):
        """A Claim to the running trial that is added for `key`; None where another has a lower number."""
        earlier = next((trial for other, trial in self.all_trials() if other == key), None)
        if earlier is not None:  # whoever was to train it died, or failed
            params, distributions = earlier.params, earlier.distributions
            config = complete_key(earlier.user_attrs["config"])
        else:
            params, distributions, config = propose(key)
        attributes = {"key": key, "config": config, "token": lock, "host": socket.gethostname(),
                      "folder": os.path.abspath(self.worker.folder), "claim": os.urandom(8).hex()}
        self.study.add_trial(self.optuna.trial.create_trial(
            state=self.optuna.trial.TrialState.RUNNING, params=params, distributions=distributions,
            user_attrs=attributes))
        number = next(trial.number for _, trial in self.all_trials()
                      if trial.user_attrs.get("claim") == attributes["claim"])
        if self.trials()[key].number == number:
            return Claim(number, key, config, lock)
        self.fail(number)
        return None

    def fail(self, number):
        with contextlib.suppress(ValueError, RuntimeError):  # another has ended it meanwhile
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def release_lost(self):
        """Marks running trials as failed whose worker is no longer there."""
        for trial in self.trials().values():
            if not trial.state.is_finished() and self.is_lost(trial):
                self.fail(trial.number)

    def is_lost(self, trial):
        owner = trial.user_attrs
        if (owner["host"], owner["folder"]) == (socket.gethostname(), os.path.abspath(self.worker.folder)):
            return not self.worker.is_held(owner["token"])
        durations = [other.duration.total_seconds() for other in self.finished().values()]
        slowest = max(durations, default=math.inf)
        age = time.time() - trial.datetime_start.timestamp()
        return age > max(LOST_AFTER, 10 * slowest)

    def finish(self, claim, row, curve):
        """Records a result, or a failure: another worker, or the next start, tries that again. row: as
        scaling.trials.read_trials() returns it. curve: {step: training loss}."""
        if has_failed(row):
            self.failed[claim.key] = row
            self.fail(claim.number)
        else:
            with contextlib.suppress(ValueError, RuntimeError):
                # Where this worker was thought dead, another has finished the trial: its row is the same
                self.record(claim, row, curve)
        self.worker.release(claim.lock)

    def record(self, claim, row, curve):
        trial_id = next(trial._trial_id for _, trial in self.all_trials() if trial.number == claim.number)
        trial = self.optuna.trial.Trial(self.study, trial_id)
        for step, loss in curve.items():
            if math.isfinite(loss):
                trial.report(loss, step)
        trial.set_user_attr("row", json.dumps(row))
        if row["diverged"]:  # or stopped early
            self.study.tell(claim.number, state=self.optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(claim.number, row["val_loss"])

    def rows(self):
        """{key: row} of the finished trials."""
        rows = {}
        for key, trial in self.finished().items():
            row = {"swept": "", "code": ""}  # which older versions did not write
            row |= json.loads(trial.user_attrs["row"])
            rows[key] = row | {"config": complete_key(row["config"])}
        return rows


def describe_other(study, settings, space):
    """What an Optuna study is of, for people, where that is another search than one of these `settings`, text
    of identity(), and this `space`, distributions; "" where it is of that search, or of none yet. None is not
    compared."""
    known = study.user_attrs
    different = ""
    if settings is not None and "settings" in known:
        different = describe_difference(known["settings"], settings)
    if space is not None and not different:
        drawn = [trial.distributions for trial in study.get_trials(deepcopy=False)]
        # All that older versions wrote down
        known_space = known.get("space") or (describe_space(drawn[0]) if drawn else "")
        different = known_space and describe_other_space(known_space, describe_space(space))
    if not different:
        return ""
    target = f", for {known['target']}" if known.get("target") else ""
    return f"another search{target} ({different})"


def find_other(storage, name, settings, space):
    """describe_other() of the study `name` of `storage`, which need not be there. Changes nothing."""
    optuna = load_optuna()
    if name not in optuna.get_all_study_names(storage):
        return ""
    return describe_other(optuna.load_study(study_name=name, storage=storage), settings, space)


def describe_difference(known, settings):
    """The settings in which two texts of identity() differ, for people, or "": the first few, before all
    those that a search may draw. `known` may be of an older version: settings it did not have are what they
    were then, and it does not say how it measured."""
    known, settings = json.loads(known), json.loads(settings)
    unsaid = {name for name in FACTS if name in settings and name not in known}
    known = complete_saved(known) | {name: settings[name] for name in unsaid}
    names = [name for name in settings if known[name] != settings[name]]
    names.sort(key=lambda name: name in TUNED)
    listed = []
    for name in names[:DIFFERENCES]:
        length = 8 if name in HASHES else 60
        there, here = str(known[name])[:length], str(settings[name])[:length]
        listed.append(f"{name}: {there}, here {here}")
    if len(names) > DIFFERENCES:
        listed.append(f"and {len(names) - DIFFERENCES} more settings")
    return "; ".join(listed)


def describe_space(distributions):
    """From what each setting is drawn, for people: lr from 0.0005 to 0.03; zero_query from False, True"""
    domains = {name: f"{domain.low:.6g} to {domain.high:.6g}" if hasattr(domain, "low") else
               ", ".join(map(str, domain.choices)) for name, domain in distributions.items()}
    return "; ".join(f"{name} from {domain}" for name, domain in domains.items())


def describe_other_space(known, space):
    """What two texts of describe_space() do not draw alike, or ""."""
    there, here = known.split("; "), space.split("; ")
    only_there = [domain for domain in there if domain not in here]
    only_here = [domain for domain in here if domain not in there]
    if not only_there + only_here:
        return ""
    return f"space: {', '.join(only_there) or 'nothing more'}; here {', '.join(only_here) or 'nothing more'}"


def capped_losses(trials):
    """{key: loss} of finished trials as the sampler is told them: at most the CAP quantile of all, which
    stopped and diverged trials get too. How bad a bad draw is says nothing about where the good ones are, and
    a model that has to fit losses from 4.6 to 9 resolves no hundredths."""
    losses = {}
    for key, trial in trials.items():
        row = json.loads(trial.user_attrs["row"])
        losses[key] = math.inf if row["diverged"] else row["val_loss"]
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if not finite:
        return dict.fromkeys(losses, 0.0)
    cap = min(max(finite), sorted(losses.values())[int(CAP * (len(losses) - 1))])
    return {key: min(loss, cap) for key, loss in losses.items()}


def mirror(shared, distributions, sampler=None):
    """A study in memory with the trials of `shared`, their losses capped: what a sampler, or a measure of
    importance, is to see. All as if drawn from `distributions`, as a range may have been widened meanwhile,
    and Optuna learns nothing of a setting from trials of another range."""
    optuna = shared.optuna
    copy = optuna.create_study(sampler=sampler)
    trials = shared.trials()
    losses = capped_losses(shared.finished())
    for key, trial in trials.items():
        state = optuna.trial.TrialState.COMPLETE
        if key not in losses:  # it is being trained: the sampler keeps away from it
            state = optuna.trial.TrialState.RUNNING
        copy.add_trial(optuna.trial.create_trial(state=state, params=trial.params, value=losses.get(key),
                                                 distributions=distributions))
    return copy


def suggest(shared, kind, seed, distributions, number):
    """Params of draw `number`: the same ones whenever they are drawn."""
    samplers, seed = shared.optuna.samplers, (seed * 1_000_003 + number) % 2**31
    if kind == "gp":
        sampler = samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
    else:
        sampler = samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True,
                                      constant_liar=True)
    try:
        return mirror(shared, distributions, sampler).ask(distributions).params
    except ImportError as error:
        raise UserError(f"sampler {kind} needs {error.name}: pip install it, or try --sampler=tpe") from None


def importances(shared, distributions):
    """{name of a param: its share}, the largest first: how much it decides whether a draw is among the best
    tenth (PED-ANOVA, arXiv 2304.10255). Empty where that cannot be said."""
    finished = shared.finished()
    if len(finished) < 2 * STARTUP or len(set(capped_losses(finished).values())) < 4:
        return {}
    evaluator = shared.optuna.importance.PedAnovaImportanceEvaluator()
    return shared.optuna.importance.get_param_importances(mirror(shared, distributions), evaluator=evaluator)


def median_at(rows, point):
    """The median training loss of `rows` at that point of their curves; nan where fewer than 8 reached it."""
    losses = [row["curve"][point] if math.isfinite(row["curve"][point]) else math.inf
              for row in rows if len(row["curve"]) > point]
    return statistics.median(losses) if len(losses) >= 8 else math.nan
