"""What the notebooks of this folder share: three forms of a lab, stored predictions, graded exercises.

The environment variable LESSON chooses the form: `rows` (the default) reads what the author's run wrote to
lessons/rows and trains nothing, `full` trains all of it, `short` trains next to nothing: it is for tests.
"""

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from answers import EXERCISES

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"rows": "trains nothing: it reads what the author's run wrote to lessons/rows",
         "short": "trains next to nothing: its numbers mean nothing", "full": "trains everything"}
UNANSWERED = ...  # what stands in the place of an answer or a prediction


class Lab:
    """One lab, by the name of its notebook. `folder` holds its trials, `out` what it draws and remembers."""

    def __init__(self, name):
        self.form = os.environ.get("LESSON", "rows")
        assert self.form in FORMS, f"LESSON must be one of {', '.join(FORMS)}, got {self.form}"
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        self.out = os.path.join(os.environ.get("LESSON_OUT", "out/lessons"), f"{name}-{self.form}")
        self.folder = f"lessons/rows/{name}" if self.form == "rows" else self.out
        os.makedirs(self.out, exist_ok=True)
        print(f"LESSON={self.form}: this {FORMS[self.form]}")

    def choose(self, full, short):
        """`short` in the short form; `full` else, as rows come from the full form."""
        return short if self.form == "short" else full

    def run(self, line):
        """Run a command of this project, `python -m scaling ...` or `python train.py ...`, as a shell would,
        but in this process: importing torch once is enough."""
        from configure import UserError, stop_signals
        stop_signals.clear()  # the kernel may have been interrupted before
        words = shlex.split(line)
        assert words[0] == "python", "commands of this project begin with python"
        if words[1] == "-m":
            from scaling.__main__ import main
            words = words[3:]
        else:
            from train import main
            words = words[2:]
        if self.form == "short":
            fit_roughly()
        print(f"$ {line}", flush=True)
        try:
            code = main(words)
        except UserError as problem:
            raise AssertionError(f"{line}: {problem}") from None
        except SystemExit as end:
            code = end.code
        assert code in (0, 1, None), f"{line}: ended with exit code {code}"

    def train(self, line):
        """run() a command that trains; where the rows are read, only print it."""
        if self.form == "rows":
            print(f"$ {line}\n(not run: what it wrote is in {self.folder}; LESSON=full runs it)")
        else:
            self.run(line)

    def recorded(self, name, line, before=None):
        """Print what a command prints, and write it to folder/name.txt with the time; what was written there
        once is read from then on. before: a folder that must have no trials when it is written."""
        path = Path(self.folder, f"{name}.txt")
        if not path.exists():
            late = before and Path(self.folder, before, "trials.csv").exists()
            assert not late, f"{before} is trained: too late for {path}"
            start, printed = time.perf_counter(), io.StringIO()
            with contextlib.redirect_stdout(printed):
                self.run(line)
            minutes = (time.perf_counter() - start) / 60
            now = time.strftime("%Y-%m-%d %H:%M")
            path.write_text(f"{now}, {minutes:.1f} minutes\n{printed.getvalue()}")
        print(path.read_text())

    def stored(self, name, compute):
        """What compute() returns, of JSON's types: computed and written to folder/name.json, or read from
        there where the rows are read."""
        path = Path(self.folder, f"{name}.json")
        if self.form != "rows":
            path.write_text(json.dumps(compute(), default=float))
        return json.loads(path.read_text())

    def secret(self, code):
        """What an exercise asks for, in a form that does not give it away."""
        return base64.b64decode(code).decode()

    def show(self, path):
        """Show a picture of the disk, at a size that fits a page."""
        from IPython.display import Image, display
        display(Image(filename=path, width=900))

    # Predictions

    def predict(self, **guesses):
        """Store what you expect, before the run that shows it. What was stored first stays."""
        stored = self.predictions()
        for name, guess in guesses.items():
            if name in stored:
                print(f"{name}: you predicted {stored[name]['guess']!r} on {stored[name]['at']}")
            elif guess is UNANSWERED:
                print(f"{name}: no prediction yet: replace ... above and run this cell again")
            else:
                stored[name] = {"guess": guess, "at": time.strftime("%Y-%m-%d %H:%M")}
                print(f"{name}: {guess!r} is stored in {self.out}/predictions.json")
        Path(self.out, "predictions.json").write_text(json.dumps(stored, indent=1))

    def predictions(self):
        with contextlib.suppress(FileNotFoundError):
            return json.loads(Path(self.out, "predictions.json").read_text())
        return {}

    def compare(self, **measured):
        """Your predictions beside what came out."""
        stored = self.predictions()
        for name, value in measured.items():
            guess = repr(stored[name]["guess"]) if name in stored else "nothing"
            print(f"{name}: you predicted {guess}; it is {value}")

    # Exercises

    def grade(self, exercise, answer, **given):
        """Raises AssertionError with a hint, unless `answer` to the exercise, such as "1.4", is right by
        answers.py. given: what the check needs of the notebook. The short form has no numbers to grade by."""
        is_right, hint = EXERCISES[exercise]
        if self.form == "short":
            print("not graded in the short form")
        elif answer is UNANSWERED:
            print("No answer yet: replace ... above and run this cell again.")
        else:
            quoted = isinstance(answer, str) and re.fullmatch(r"[-+.\d]+|True|False", answer)
            assert not quoted, f"{answer!r} is a text; write it without quotation marks. Hint: {hint}"
            try:
                right = is_right(answer, **given)
            except Exception as problem:  # such as a number where a function is asked for
                raise AssertionError(f"{answer!r} cannot be graded, {problem}: is it of the kind that the "
                                     f"exercise asks for? Hint: {hint}") from None
            assert right, f"{answer!r} is not it. Hint: {hint}"
            print(f"{answer!r} is right.")


def fit_roughly():
    """A law from few starts and draws: for the short form, whose numbers mean nothing."""
    from scaling import law_fits
    law_fits.BEST_STARTS, law_fits.DRAWS = 1, 5
    law_fits.bootstrap.__defaults__ = (5,)  # its number of draws


# What no command draws or prints

def print_report(folder, base):
    """What scaling.report says of the rows in a folder, without its figures. base: the proxy's size."""
    from scaling.report import analyze, format_report
    from scaling.rows import read_rows
    print(f"$ python -m scaling report {folder} --base={base}")
    print(format_report(analyze(read_rows([folder]), base=base)))



def measure_coordinates(words, widths, steps=5, seeds=2):
    """scaling.coordinate_check of the configuration `words`, as JSON: {rows, means: {layer: [mean |change| at
    each width]}}."""
    from configure import configure
    from scaling.coordinate_check import coordinate_check
    rows, measured = coordinate_check(configure(shlex.split(words)), "width", widths, steps, seeds)
    means = {}
    for row in rows:
        by_width = measured[row["layer"], steps]
        means[row["layer"]] = [sum(of_seeds) / len(of_seeds) for of_seeds in by_width.values()]
    return {"rows": rows, "widths": widths, "means": means}


def format_coordinates(checked):
    """The powers that measure_coordinates() found, a line for each layer."""
    lines = [f"{'output of':<20}{'change ~ width^':>16}{'± 95%':>8}{'under μP':>11}"]
    for row in checked["rows"]:
        numbers = f"{row['change']:>+12.2f}{row['interval']:>8.2f}{row['expected']:>+11.1f}"
        lines.append(f"{row['layer']:<24}{numbers}   {row['verdict']}")
    return "\n".join(lines)


def new_figure(columns=1, **options):
    """(figure, [axes]) in the style of this project's figures, for notebooks."""
    from scaling.figures import load_pyplot
    figure, axes = load_pyplot().subplots(1, columns, squeeze=False, layout="constrained",
                                          figsize=(5.2 * columns, 4.2), **options)
    return figure, list(axes[0])


def save(figure, path):
    """Writes the figure to `path`, small enough for a notebook; returns the path."""
    figure.savefig(path, dpi=80)
    return path


def draw_coordinates(checks, path):
    """{title: measure_coordinates()}, a panel each."""
    from scaling.figures import BESIDE, line_style
    figure, panels = new_figure(len(checks), sharey=True)
    for axes, (title, checked) in zip(panels, checks.items(), strict=True):
        for i, (layer, means) in enumerate(checked["means"].items()):
            axes.plot(checked["widths"], means, label=layer, **line_style(i))
        axes.set(title=title, xlabel="width", xscale="log", yscale="log")
        axes.set_xticks(checked["widths"], [str(width) for width in checked["widths"]])
        axes.minorticks_off()
    panels[0].set_ylabel("mean |change| of an output in 5 steps")
    panels[-1].legend(fontsize=9, title="output of", **BESIDE)
    return save(figure, path)


def draw_optima(report, path):
    """Where the parabola of each size is lowest, with its 95% interval: a line for each ladder of the report
    of scaling.report."""
    from scaling.figures import line_style, title
    figure, [axes] = new_figure()
    axis, swept, sizes = report["axis"], report["swept"], set()
    for i, (name, ladder) in enumerate(report["ladders"].items()):
        found = [size for size in ladder["sizes"] if size["log2_best"] is not None]
        x, best = ([size[key] for size in found] for key in (axis, "log2_best"))
        reach = [size["interval"][1] - size["log2_best"] for size in found]
        axes.errorbar(x, best, reach, capsize=4, label=title(name), **line_style(i))
        sizes |= {*x}
    axes.set(xscale="log", xlabel=axis, ylabel=f"best log2 {swept}, ± 95%")
    axes.set_xticks(sorted(sizes), [f"{size:g}" for size in sorted(sizes)])
    axes.minorticks_off()
    axes.legend(fontsize=10)
    return save(figure, path)


@contextlib.contextmanager
def changed_table(role=None, forward=None, **exponents):
    """Within, the table of muP has these exponents, (of width, of depth), for the role; or, with forward, for
    these factors of the forward pass: {name: exponents}."""
    import parametrization
    right = parametrization.TABLES["mup"]

    def changed(alpha):
        roles, factors = right(alpha)
        if role:
            roles = roles | {role: roles[role]._replace(**exponents)}
        return roles, factors | (forward or {})

    parametrization.TABLES["mup"] = changed
    try:
        yield
    finally:
        parametrization.TABLES["mup"] = right


def compare_coordinates(checks):
    """The powers of several measure_coordinates(), {title: it}, side by side."""
    lines = [f"{'change ~ width^':<24}" + "".join(f"{title:>18}" for title in checks)]
    for rows in zip(*(checked["rows"] for checked in checks.values()), strict=True):
        powers = "".join(f"{row['change']:>+11.2f} ±{row['interval']:.2f}".rjust(18) for row in rows)
        lines.append(f"{rows[0]['layer']:<24}{powers}")
    return "\n".join(lines)


def first_off(checked):
    """Where to look first: the first row from the top that fails, logits left out; None where all pass."""
    failed = [row["layer"] for row in checked["rows"] if row["verdict"] == "FAIL"]
    return next((layer for layer in failed if layer != "logits"), None)


# A copy of the project, to be edited

def copy_project(folder):
    """Copies the sources of this project to `folder`, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    left_out = shutil.ignore_patterns(".*", "__pycache__", "out", "prepared", "results", "tests", "lessons")
    shutil.copytree(ROOT, folder, ignore=left_out)


def edit(folder, name, old, new):
    """Replaces the text `old`, which the file must have once, by `new`."""
    path = Path(folder, name)
    text = path.read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))


def run_copy(folder, line):
    """What a command prints that runs in the copy in `folder`."""
    words = [sys.executable, *shlex.split(line)[1:], f"--data_dir={ROOT / 'data' / 'prepared'}"]
    done = subprocess.run(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout
