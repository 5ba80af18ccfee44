"""A search's trials in an Optuna study, which processes and machines share: each trial is trained once.

A trial of the study stands for a key: the number of a draw, or the settings of a trial that confirms a
result. Whoever trains it adds it as a running trial, with all it needs to be trained again; of two that add
the same key at once the lower number goes ahead. A trial that failed, or whose worker died, is marked as
failed, and its key is free again.
"""

import contextlib
import json
import math
import os
import secrets
import socket
import statistics
import time
from typing import NamedTuple

from configure import UserError, complete_saved
from scaling.trials import FACTS, has_failed

STUDY_FILE = "study.log"
STARTUP = 16  # draws from all of the space before the sampler has something to learn from
CAP = 0.7  # quantile of the losses
LOST_AFTER = 600  # seconds; a trial on another machine is lost after 10 times the slowest, this at least


class Claim(NamedTuple):
    """A trial that this worker is to train."""
    number: int  # in the study
    key: str
    config: str  # settings as JSON, scaling.trials.identity()


def load_optuna():
    """The module, silent. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("search: needs Optuna; pip install -r requirements.txt brings it") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class JournalLock:
    """What Optuna holds while it appends to the journal: the kernel drops it when the process dies, and the
    half line that such a death leaves is cut off, which Optuna's own locks do not do."""

    def __init__(self, path):
        self.path = path

    def acquire(self):
        import fcntl
        self.file = open(f"{self.path}.lock", "ab")
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        with open(self.path, "r+b") as journal:
            journal.seek(max(0, os.path.getsize(self.path) - 2**20))
            start, tail = journal.tell(), journal.read()
            complete = tail.rfind(b"\n") + 1
            if complete < len(tail):
                journal.truncate(start + complete)
        return True

    def release(self):
        self.file.close()


def open_storage(url, folder):
    """The Optuna storage at `url`, or the journal in `folder` when that is empty. Raises UserError."""
    optuna = load_optuna()
    try:
        if url and not url.startswith("journal:"):
            return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        path = url.removeprefix("journal:").removeprefix("//") or os.path.join(folder, STUDY_FILE)
        lock = JournalLock(path)
        return optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(path, lock_obj=lock))
    except Exception as error:  # whatever a database driver raises
        raise storage_error(url or folder, error) from None


def storage_error(where, error):
    reason = " ".join(str(error.__cause__ or error).split("\n[SQL")[0].split())[:200]
    return UserError(f"storage: got {where}, which does not answer ({type(error).__name__}: {reason}); takes "
                     "sqlite:///FILE, postgresql+psycopg2://..., journal:FILE, or none: a journal in --out")


@contextlib.contextmanager
def storage_errors_in_one_line(where):
    """A database that is down, or a full disk, ends a search in one line. Raises UserError."""
    optuna = load_optuna()
    kinds = [optuna.exceptions.StorageInternalError]
    with contextlib.suppress(ImportError):
        from sqlalchemy.exc import SQLAlchemyError
        kinds.append(SQLAlchemyError)
    try:
        yield
    except tuple(kinds) as error:
        raise storage_error(where, error) from None


class SharedStudy:
    """The study `name` of `storage`, for one worker of it (a scaling.worker.Worker). `settings`, text, is
    what the study is of, or None to only read it: a study of other settings is rejected. Raises UserError."""

    def __init__(self, storage, name, worker, settings):
        optuna = load_optuna()
        self.optuna, self.worker, self.token = optuna, worker, secrets.token_hex(8)
        self.failed = {}  # {key: row} of trials that failed here, and are not tried again by this worker
        worker.claim(self.token)  # a sign of life for others
        self.study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        known = self.study.user_attrs.get("settings")
        if settings is None:
            return
        if known is None:
            self.study.set_user_attr("settings", settings)
        elif different := difference(known, settings):
            raise UserError(f"out: got the study {name!r} of other settings ({different}); takes another "
                            "--out, or another --study in the same storage")

    def trials(self):
        """{key: FrozenTrial} of all trials but the failed ones."""
        found = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state != self.optuna.trial.TrialState.FAIL:
                found.setdefault(trial.user_attrs["key"], trial)
        return found

    def finished(self):
        """{key: FrozenTrial} of those that have a result."""
        return {key: trial for key, trial in self.trials().items() if trial.state.is_finished()}

    def failed_keys(self):
        """The keys of the trials that failed here, but for those that another worker has tried or is trying
        again."""
        return self.failed.keys() - self.trials().keys()

    def claim(self, keys, propose):
        """A Claim to the first of `keys` that nobody has; None when there is none. propose(key): params,
        distributions and settings of its trial, unless an earlier worker has proposed them."""
        self.release_lost()
        live = self.trials()
        for key in keys:
            if key in live or key in self.failed:
                continue
            params, distributions, config = self.earlier_proposal(key) or propose(key)
            mine = {"key": key, "config": config, "token": self.token, "host": socket.gethostname(),
                    "folder": os.path.abspath(self.worker.folder), "claim": secrets.token_hex(8)}
            template = self.optuna.trial.create_trial(
                state=self.optuna.trial.TrialState.RUNNING, params=params, distributions=distributions,
                user_attrs=mine)
            self.study.add_trial(template)
            number = next(trial.number for trial in self.study.get_trials(deepcopy=False)
                          if trial.user_attrs.get("claim") == mine["claim"])
            if self.trials()[key].number == number:
                return Claim(number, key, config)
            self.fail(number)  # another was faster
        return None

    def earlier_proposal(self, key):
        """What a worker that died was to train for `key`, or None."""
        for trial in self.study.get_trials(deepcopy=False):
            if trial.user_attrs["key"] == key:
                return trial.params, trial.distributions, trial.user_attrs["config"]
        return None

    def fail(self, number):
        with contextlib.suppress(ValueError, RuntimeError):  # another has ended it meanwhile
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def release_lost(self):
        """Marks running trials as failed whose worker is no longer there."""
        running = [trial for trial in self.trials().values() if not trial.state.is_finished()]
        for trial in running:
            if self.is_lost(trial):
                self.fail(trial.number)

    def is_lost(self, trial):
        owner = trial.user_attrs
        here = socket.gethostname(), os.path.abspath(self.worker.folder)
        if (owner["host"], owner["folder"]) == here:
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
            return
        trial_id = next(trial._trial_id for trial in self.study.get_trials(deepcopy=False)
                        if trial.number == claim.number)
        trial = self.optuna.trial.Trial(self.study, trial_id)
        try:
            for step, loss in curve.items():
                if math.isfinite(loss):
                    trial.report(loss, step)
            trial.set_user_attr("row", json.dumps(row))
            if row["diverged"]:  # or stopped early
                self.study.tell(claim.number, state=self.optuna.trial.TrialState.PRUNED)
            else:
                self.study.tell(claim.number, row["val_loss"])
        except (ValueError, RuntimeError):
            pass  # this worker was thought dead, and another has finished the trial: its row is the same

    def rows(self):
        """{key: row} of the finished trials."""
        return {key: json.loads(trial.user_attrs["row"]) for key, trial in self.finished().items()}


def difference(known, settings):
    """The first setting in which two texts of identity() differ, for people, or "". `known` may be of an
    older version: settings it did not have are what they were then, and it does not say how it measured."""
    known, settings = json.loads(known), json.loads(settings)
    unsaid = {name for name in FACTS if name in settings and name not in known}
    known = complete_saved(known) | {name: settings[name] for name in unsaid}
    for name in settings:
        if known[name] != settings[name]:
            return f"{name}: {known[name]}, here {settings[name]}"
    return ""


def make_sampler(optuna, kind, seed, number):
    """The sampler of draw `number`: the same one whenever it is drawn."""
    seed = (seed * 1_000_003 + number) % 2**31
    if kind == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True,
                                      constant_liar=True)


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


def mirror(shared, sampler=None):
    """A study in memory with the trials of `shared`, their losses capped: what a sampler, or a measure of
    importance, is to see."""
    optuna = shared.optuna
    copy = optuna.create_study(sampler=sampler)
    trials = shared.trials()
    losses = capped_losses(shared.finished())
    for key, trial in trials.items():
        if key in losses:
            copy.add_trial(optuna.trial.create_trial(params=trial.params, distributions=trial.distributions,
                                                     value=losses[key]))
        else:  # one that is being trained: the sampler keeps away from it
            copy.add_trial(optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING, params=trial.params,
                distributions=trial.distributions))
    return copy


def suggest(shared, kind, seed, distributions, number):
    """Params of draw `number`."""
    sampler = make_sampler(shared.optuna, kind, seed, number)
    try:
        return mirror(shared, sampler).ask(distributions).params
    except ImportError as error:
        raise UserError(f"sampler: got {kind}, which needs {error.name}; takes --sampler=tpe") from None


def importances(shared):
    """{name of a param: its share}, the largest first: how much it decides whether a draw is among the best
    tenth (PED-ANOVA, arXiv 2304.10255). Empty where that cannot be said."""
    finished = shared.finished()
    if len(finished) < 2 * STARTUP or len(set(capped_losses(finished).values())) < 4:
        return {}
    evaluator = shared.optuna.importance.PedAnovaImportanceEvaluator()
    return shared.optuna.importance.get_param_importances(mirror(shared), evaluator=evaluator)


def median_at(rows, point):
    """The median training loss of `rows` at that point of their curves; nan where fewer than 8 reached it."""
    losses = [row["curve"][point] if math.isfinite(row["curve"][point]) else math.inf
              for row in rows if len(row["curve"]) > point]
    return statistics.median(losses) if len(losses) >= 8 else math.nan
