"""Scaling laws: fits find what rows were made from, and the commands say what they can tell and no more."""

import hashlib
import json
import pathlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from children import save_only
from conftest import tiny
from processes import lab_words

import parametrization
from configure import Config, UserError
from model import GPT
from scaling import law_fits, law_trials, laws, plane, shapes, transfer
from scaling.cli import parse_values
from scaling.fits import interval
from scaling.law_fits import ALL_FORMS, FORMS, Law, bootstrap, fit_law, predict, predict_frontier
from scaling.law_report import format_forecast
from scaling.sweep import run_trials, trial_configs
from scaling.trials import SETTING_COLUMNS, append_rows, identity, read_trials
from training.model_size import model_size

# Constants in the range of small models of text. A law is one of n - n0 and d - d0; here n0 = d0 = 0
TRUE = {"chinchilla": Law("chinchilla", np.array([np.log(60), np.log(900), np.log(1.5), 0.35, 0.4]), 0, 0),
        "kaplan": Law("kaplan", np.array([0.8 * 23, 24.0, 0.8, 0.1]), 0, 0),
        "kaplan_floor": Law("kaplan_floor", np.array([0.8 * 14, 15.0, 0.8, 0.3, np.log(1.5)]), 0, 0),
        "frontier": Law("frontier", np.array([np.log(600), np.log(1.5), 0.2]), 0, 0)}
START = [np.array([-1, 0, 0, 0.3, 0.3])]  # near each of them, for Chinchilla's form
SEED_NOISE = 0.001  # of the loss: what two seeds of one setting differ by in the committed rows
SHAPES, STEPS = ((32, 2), (64, 2), (128, 4), (192, 6), (256, 8)), (200, 400, 800, 1600, 3200)


def grid(law, seeds=2, noise=SEED_NOISE, draw=0):
    """(N, D, loss) of 5 sizes, 5 horizons and `seeds` trials of each pair."""
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(3e5, 3e7, 5)))
    N, D = np.repeat(N, seeds), np.repeat(D, seeds)
    return N, D, law.loss(N, D) * np.exp(np.random.default_rng(draw).normal(0, noise, len(N)))


@pytest.mark.parametrize("form", FORMS)
def test_a_fit_finds_the_law_that_rows_were_made_from_and_forecasts_100_times_their_flops(form):
    true, (N, D, loss) = TRUE[form], grid(TRUE[form])
    law = fit_law(form, N, D, loss)
    assert law.loss(1e8, 3e8) == pytest.approx(true.loss(1e8, 3e8), abs=0.02)
    for name in ("alpha", "beta", "E", "alpha_N", "alpha_D"):
        if name in true.constants():
            assert law.constants()[name] == pytest.approx(true.constants()[name], rel=0.06), name
    assert law.sigma_seed == pytest.approx(SEED_NOISE, rel=0.4) and law.sigma_cell < SEED_NOISE


@pytest.mark.parametrize("form", ["chinchilla", "kaplan_floor"])  # which has Kaplan's at E = 0
def test_fitted_to_the_small_trials_the_form_that_rows_were_made_from_misses_the_others_least(form,
                                                                                              monkeypatch):
    monkeypatch.setattr(law_fits, "BEST_STARTS", 3)
    N, D, loss = grid(TRUE[form])
    fits = {other: {"backtest": law_fits.backtest(other, N, D, loss, 6 * N * D)} for other in FORMS}
    assert laws.choose(fits) == form
    assert law_fits.missed_by(fits[form]) < 0.01 < law_fits.missed_by(fits["kaplan"])


def test_a_forecast_is_as_unsure_as_such_laws_have_missed():
    law = Law("chinchilla", np.array([0.0, 0.0, 0.5, 0.3, 0.3]), np.log(1e6), np.log(1e8), 0.001, 0.001)
    loss, (low, high) = predict(law, [law], 1e8, 1e9)
    _, (lower, higher) = predict(law, [law] * 200, 1e8, 1e9, missed=0.1)
    assert high - low < 0.02 and lower == pytest.approx(loss - 0.196, abs=0.02) and higher > loss + 0.17


def test_a_forecast_beyond_the_fit_is_as_unsure_as_the_laws_are_apart(monkeypatch):
    numbers = {"all": 1e8, "body": 1e8}
    monkeypatch.setattr(laws, "count_parameters", lambda config: (numbers, 6e8))
    config = tiny(width=64, head_dim=16, vocab_size=5)

    def width_of_interval(E, flops, missed=1e-4):
        fits = {}
        for count, its, noise in (("all", 0.5, 1e-4), ("body", E, missed)):
            law = Law("chinchilla", np.array([0.0, 0.0, its, 0.3, 0.3]), np.log(1e6), np.log(1e8), 1e-3, 1e-3)
            fits["chinchilla", count] = {"law": law, "laws": [law] * 20, "backtest": np.array([noise])}
        report = {"fits": fits, "chosen": ("chinchilla", "all"), "flops": [1.0, flops], "frontier": None}
        low, high = laws.forecast(report, config)["interval"]
        return high - low

    within, beyond = 1e30, 1.0
    assert width_of_interval(0.8, within) == pytest.approx(width_of_interval(0.5, within), rel=0.01)
    apart = np.std([np.exp(0.5), np.exp(0.8)])
    assert width_of_interval(0.5, beyond) == pytest.approx(width_of_interval(0.5, within), rel=0.01)
    assert width_of_interval(0.8, beyond) == pytest.approx(2 * 1.96 * apart, rel=0.15)
    assert width_of_interval(0.8, beyond, missed=0.1) < 1.1 * width_of_interval(0.5, beyond)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    true, held, predicted = TRUE["chinchilla"], 0, 0
    for draw in range(8):
        N, D, loss = grid(true, seeds=1, noise=0.003, draw=draw)
        law = fit_law("chinchilla", N, D, loss, starts=START)
        drawn = bootstrap(law, N, D, draws=16)
        low, high = interval([other.constants()["alpha"] for other in drawn])
        held += low <= 0.35 <= high
        measured = true.loss(1e8, 3e8) * np.exp(np.random.default_rng(100 + draw).normal(0, 0.003))
        low, high = predict(law, drawn, 1e8, 3e8)[1]
        predicted += low <= measured <= high
    assert held >= 6 and predicted >= 6  # of 8: where 95% holds, fewer is a chance of 1 in 150


def test_one_bad_trial_moves_a_fit_little():
    N, D, loss = grid(TRUE["chinchilla"])
    loss[7] *= 2
    law = fit_law("chinchilla", N, D, loss, starts=START)
    assert law.constants()["alpha"] == pytest.approx(0.35, rel=0.03)


def test_the_derivatives_of_each_form_are_those_of_its_loss():
    n, d = np.random.default_rng(0).normal(size=(2, 6))
    for form, law in TRUE.items():
        theta = law.theta / 10
        function = ALL_FORMS[form].function
        for i in range(len(theta)):
            step = 1e-6 * np.eye(len(theta))[i]
            slope = (function(theta + step, n, d)[0] - function(theta - step, n, d)[0]) / 2e-6
            assert function(theta, n, d)[1][i] == pytest.approx(slope, abs=1e-7), (form, i)


def equal_flops(law, low, high, budgets=5):
    """(N, D, FLOPs, loss) of 7 sizes from `low` to `high` times those that suit each budget."""
    C = np.repeat(np.geomspace(1e13, 1e16, budgets), 7)
    N = np.tile(np.geomspace(low, high, 7), budgets) * np.sqrt(C / 12)
    return N, C / (6 * N), C, law.loss(N, C / (6 * N))


def test_parabolas_at_equal_flops_find_how_the_best_size_grows(monkeypatch):
    """With alpha = beta the best N grows as C^0.5, whatever A and B are."""
    monkeypatch.setattr(law_fits, "DRAWS", 40)
    law = Law("chinchilla", np.array([np.log(400), np.log(400), np.log(1.5), 0.4, 0.4]), 0, 0, 1e-3)
    found, _ = law_fits.isoflop(law, *equal_flops(law, 0.1, 20))
    assert len(found["budgets"]) == 5 and found["exponent"] == pytest.approx(0.5, abs=0.02)
    assert found["interval"][0] < 0.5 < found["interval"][1]


def test_minima_of_a_grid_off_its_center_are_corrected_even_by_a_law_that_is_not_quite_right():
    true = Law("chinchilla", np.array([np.log(60), np.log(9000), np.log(1.5), 0.3, 0.55]), 0, 0)
    wrong = true._replace(theta=true.theta + [0.1, 0.1, 0.03, 0.01, 0.01])
    N, D, C, loss = equal_flops(true, 0.05, 3)
    sizes, lowest = law_fits.law_frontier(true, {(n, 6 * n) for n in N}, np.unique(C))

    def errors(shifts):
        best = [its["best"] for its in law_fits.isoflop_optima(N, D, C, loss, shifts)[0]]
        return [np.abs([its["loss"] - low for its, low in zip(best, lowest, strict=True)]).max(),
                np.abs(np.log([its["N"] / n for its, n in zip(best, sizes, strict=True)])).max()]

    assert min(np.divide(errors(None), errors(law_fits.off_center(wrong, N, D, C)))) > 3


def test_a_law_through_the_minima_alone_forecasts_the_frontier(monkeypatch):
    monkeypatch.setattr(law_fits, "DRAWS", 6)
    law = TRUE["chinchilla"]._replace(sigma_cell=1e-3)
    N, D, C, loss = equal_flops(law, 0.05, 3)
    _, found = law_fits.isoflop(law, N, D, C, loss)
    _, [lowest] = law_fits.law_frontier(law, {(n, 6 * n) for n in N}, [3e17])
    predicted, (low, high) = predict_frontier(found, 3e17)
    assert predicted == pytest.approx(lowest, abs=0.01) and low < lowest < high
    assert found["constants"]["E"][0] == pytest.approx(1.5, rel=0.03)
    _, few = law_fits.isoflop(law, *(column[C < 1e15] for column in (N, D, C, loss)))
    assert few is None, "three minima and three constants"
    loss[C > 9e15] *= 1.02  # which the other budgets do not foresee
    _, bent = law_fits.isoflop(law, N, D, C, loss)
    unsure, sure = (np.ptp(predict_frontier(bent | {"shorter": shorter}, 3e17)[1])
                    for shorter in (bent["shorter"], bent["law"]))
    assert unsure > 1.2 * sure


def test_training_curves_of_tuned_runs_on_the_frontier_collapse_and_another_stands_out():
    law, share = TRUE["chinchilla"], (np.arange(25) + 0.5) / 25
    random, rows = np.random.default_rng(0), []
    sizes = np.geomspace(1e5, 1e7, 5)
    best = [n * (law.theta[4] * np.exp(law.theta[1] - law.theta[0]) / law.theta[3]) ** (1 / 0.4)
            * n ** (0.35 / 0.4 - 1) for n in sizes]  # beta B / D^beta = alpha A / N^alpha
    for n, on_frontier in zip(sizes, best, strict=True):
        for d in on_frontier * np.array([0.1, 1, 8]):
            for _ in range(2):
                noise = np.exp(random.normal(0, 0.003, 25))
                rows.append((n, d, law.loss(n, d), tuple(law.loss(n, d * share) * noise)))

    def collapse_of(rows):
        *columns, curves = zip(*rows, strict=True)
        return law_fits.collapse(law, *map(np.array, columns), curves)

    tuned = collapse_of(rows)
    assert [model["D"] for model in tuned["models"]] == pytest.approx(best)
    assert tuned["seeds"] < 0.02 and tuned["apart"] < 1.5 * tuned["seeds"]
    slow = [(n, d, loss, tuple(1.5 + 1.2 * (np.array(curve) - 1.5))) if n == sizes[1] else (n, d, loss, curve)
            for n, d, loss, curve in rows]
    other = collapse_of(slow)
    assert max(other["models"], key=lambda model: model["off"])["N"] == sizes[1]
    assert other["apart"] > 3 * other["seeds"]
    assert collapse_of([row[:3] + ((),) for row in rows]) is None, "rows of older versions have no curve"


def simulated_rows(folder, law, shapes=SHAPES, steps=STEPS, seeds=(0, 1), context=256, **settings):
    """Writes the rows that a sweep would leave if trials had the losses of `law`, of all parameters."""
    random, rows = np.random.default_rng(len(shapes)), []
    for width, depth in shapes:
        for count in steps:
            for seed in seeds:
                config = Config(width=width, depth=depth, steps=count, seed=seed, batch=16, context=context,
                                head_dim=32, base_head_dim=32, **settings)
                numbers, flops_per_token = laws.count_parameters(replace(config, vocab_size=2048))
                tokens = count * 16 * context
                loss = law.loss(numbers["all"], tokens) * np.exp(random.normal(0, SEED_NOISE))
                rows.append({name: getattr(config, name) for name in SETTING_COLUMNS} | {
                    "val_loss": loss, "parameters": numbers["all"], "flops": flops_per_token * tokens,
                    "seconds": 1, "diverged": False, "swept": "", "failure": "", "curve": "",
                    "config": identity(config)})
    folder.mkdir(exist_ok=True)
    append_rows(folder / "trials.csv", rows)
    return str(folder)


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(law_fits, "DRAWS", 8)
    monkeypatch.setattr(law_fits, "BEST_STARTS", 3)


def test_the_command_forecasts_what_it_has_not_seen_and_says_whether_it_hit(tmp_path, few_draws, monkeypatch,
                                                                            capsys):
    true = TRUE["chinchilla"]
    rows = simulated_rows(tmp_path / "rows", true, seeds=[0])
    unseen = simulated_rows(tmp_path / "unseen", true, shapes=[(512, 12)], steps=[25_600], seeds=[0])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_only((".png",)))  # and the same as .svg
    monkeypatch.setattr(laws, "MOST_STEPS", 5_000)  # the best model would take about 14,000
    laws.main([rows, "--flops=1e14", f"--measured={unseen}", f"--to={tmp_path}/to"])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "to" / "laws.json").read_text())
    best, seen = report["forecasts"]
    assert "nats, inside the interval" in said and seen["beyond"] > 30
    assert best["flops"] == pytest.approx(1e14, rel=0.01) and best["width"] % 32 == 0
    assert best["steps"] <= 5_000
    assert len(report["points"]) == 25 and max(abs(p["residual"]) for p in report["points"]) < 0.1
    assert {path.name for path in (tmp_path / "to").glob("*.png")} >= {"frontier.png"}
    missed = seen | {"measured": seen["interval"][1] + 0.01}
    assert "nats, OUTSIDE the interval" in "\n".join(format_forecast(missed))


def test_a_sealed_forecast_says_what_it_was_made_of_and_is_never_replaced(tmp_path, few_draws, capsys,
                                                                         monkeypatch):
    monkeypatch.setattr(laws, "FORMS", {"chinchilla": FORMS["chinchilla"]})  # one is fast
    monkeypatch.setattr(laws, "draw_laws", lambda report, folder: [])
    rows, kept = simulated_rows(tmp_path / "rows", TRUE["chinchilla"], seeds=[0]), tmp_path / "forecast.txt"
    words = [rows, "--target=config/proxy.py", "--context=256", "--tokenizer=bpe:2048", f"--to={tmp_path}"]
    with pytest.raises(UserError, match="^seal needs --target"):
        laws.main([rows, "--seal", f"--to={tmp_path}"])
    laws.main([*words, "--seal"])
    text = kept.read_text()
    assert hashlib.sha256((tmp_path / "rows/trials.csv").read_bytes()).hexdigest() in text
    assert "--target=config/proxy.py" in text and "forecast: width 128, depth 4" in text
    laws.main(words)  # not sealed: it may be asked again
    with pytest.raises(UserError, match="^seal needs .* never replaced"):
        laws.main([*words, "--seal"])
    assert kept.read_text() == text and str(kept) in capsys.readouterr().out


@pytest.mark.parametrize(("misses", "best"), [
    ([0.02, 0.03], "first"), ([0.03, 0.02], "second"), ([None, 0.02], "second"), ([0.001, None], "second")])
def test_the_law_that_forecasts_is_chosen_by_one_measure_for_all(misses, best):
    """Where one law cannot be tested on larger trials, all are compared by their residuals."""
    class Law(NamedTuple):
        sigma_cell: float
        sigma_seed: float

    fits = {name: {"backtest": None if missed is None else np.full(3, missed), "law": Law(residual, 0.005)}
            for name, missed, residual in zip(("first", "second"), misses, (0.011, 0.004), strict=True)}
    assert laws.choose(fits) == best


def test_what_no_law_can_be_fitted_to_is_rejected_in_a_line(tmp_path, monkeypatch):
    def fails(words, match):
        with pytest.raises(UserError, match=match):
            laws.main(words)

    true = TRUE["chinchilla"]
    few = simulated_rows(tmp_path / "few", true, shapes=SHAPES[:2], seeds=[0])
    rows = simulated_rows(tmp_path / "rows", true, shapes=SHAPES[:3], steps=STEPS[:3], seeds=[0])
    fails([few], "^laws: got 2 sizes and 5 numbers of tokens, 10 pairs; a law needs 3 of each")
    other = simulated_rows(tmp_path / "other", true, SHAPES[:1], STEPS[:1], context=128)
    fails([rows, other], "^context must be the same")
    fails([], "^laws: give .* folders")
    fails([rows, "--flops=x"], "^flops must be")
    fails([rows, "--target=config/target.py", "--tokenizer=bytes"], "^tokenizer must be the same")
    fails([rows, "--target=config/target.py", "--lr=1"], "^lr has no effect on a forecast")
    fails([rows, "--transfer"], "^laws: --transfer needs rows with init_from")
    fitted = {"fits": {("chinchilla", "all"): {"law": true}}, "chosen": ("chinchilla", "all")}
    monkeypatch.setattr(laws, "analyze", lambda trials: fitted)
    fails([rows, "--flops=1e3"], "^flops must be enough for 100 steps")


def test_of_settings_tried_at_one_size_a_law_takes_the_best(tmp_path):
    few, worse = (SHAPES[:2], STEPS[:2]), TRUE["chinchilla"].theta.copy()
    worse[2] = np.log(2.0)  # the irreducible loss
    good = simulated_rows(tmp_path / "rows", TRUE["chinchilla"], *few, lr=2**-8)
    simulated_rows(tmp_path / "rows", TRUE["chinchilla"]._replace(theta=worse), *few, lr=2**-10)
    trials = laws.read_folders([good])
    assert len(trials) == 8 and {trial.config.lr for trial in trials} == {2**-8}


def test_parameters_are_counted_with_and_without_what_the_vocabulary_needs():
    config = tiny(vocab_size=64, position="learned")
    numbers, _ = laws.count_parameters(config)
    by_name = {name: p.numel() for name, p in GPT(config).named_parameters()}
    names = "token_embedding.weight", "position_embedding.weight", "readout.weight"
    outside = sum(by_name[name] for name in names)
    assert numbers == {"all": sum(by_name.values()), "body": sum(by_name.values()) - outside}
    assert law_trials.vocab_size_of(replace(config, vocab_size=None), numbers["all"]) == 64


def test_a_sweep_holds_the_training_flops_by_the_steps(corpus):
    config = Config(**corpus | {"steps": 1000})
    trials = trial_configs(config, {"width,depth": [(16, 1), (32, 2), (64, 8)]}, "flops")
    flops = [model_size(replace(trial, vocab_size=257)).flops_per_token * trial.steps for trial in trials]
    assert flops == pytest.approx([flops[1]] * 3, rel=0.02) and trials[1].steps == 1000
    assert trials[0].steps > 2000 and trials[2].steps < 200


def test_settings_can_move_together_on_one_axis():
    assert parse_values("width,depth", "64x2,128x4") == [(64, 2), (128, 4)]
    trials = trial_configs(Config(), {"width,depth": [(64, 2), (128, 4)], "lr": [0.1, 0.2]})
    assert [(t.width, t.depth, t.lr) for t in trials] == [
        (64, 2, 0.1), (64, 2, 0.2), (128, 4, 0.1), (128, 4, 0.2)]
    with pytest.raises(UserError, match="^width,depth"):
        parse_values("width,depth", "64")


def test_the_map_between_sp_and_mup_shows_the_best_rate_of_each(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parametrization, "TABLES", dict(parametrization.TABLES))
    settings = corpus | {"depth": 1, "steps": 2}
    words = [f"--{name}={value}" for name, value in settings.items()]
    plane.main(["init=0,1", "updates=0.5,1", "lr=2**-9,2**-6", f"--out={tmp_path}", *words])
    rows = read_trials(str(tmp_path))
    points = json.loads((tmp_path / "plane.json").read_text())["points"]
    assert [(p["mup_init"], p["mup_lr"]) for p in points] == [(0, 0.5), (0, 1), (1, 0.5), (1, 1)]
    for i, point in enumerate(points):
        pair = rows[2 * i:2 * i + 2]
        assert point["loss"] == min(row["val_loss"] for row in pair) and point["edge"]
    assert (tmp_path / "plane.png").exists() and "μP" in capsys.readouterr().out
    run_trials(trial_configs(Config(**settings), {"width": [16], "lr": [2**-6]}), str(tmp_path))
    with pytest.raises(UserError, match="^plane: .* these vary .*width"):
        plane.main([str(tmp_path)])


@pytest.mark.parametrize("equal", shapes.COSTS)
def test_shapes_of_equal_cost_cost_the_same(corpus, equal):
    config = Config(**corpus | {"width": 256, "depth": 4, "head_dim": 8, "base_head_dim": 8, "steps": 1000})
    found = shapes.shapes_of(config, [1, 2, 4, 16], equal)
    sizes = [model_size(replace(shape, vocab_size=257)) for shape in found]
    costs = [size.parameters if equal == "parameters" else size.flops_per_token * shape.steps
             for size, shape in zip(sizes, found, strict=True)]
    assert costs == pytest.approx([costs[2]] * 4, rel=0.005 if equal == "flops" else 0.05)
    assert found[2].width == 256 and found[0].width > 400 and found[3].width < 160
    with pytest.raises(UserError, match="^equal must be parameters or flops, got flop"):
        shapes.shapes_of(config, [1], "flop")


@pytest.fixture
def other_text(corpus, tmp_path):
    """A folder of the documents of `corpus`, backwards."""
    (tmp_path / "backwards").mkdir()
    for path in pathlib.Path(corpus["dataset"]).iterdir():
        (tmp_path / "backwards" / path.name).write_text(path.read_text()[::-1])
    return str(tmp_path / "backwards")


def test_shapes_are_trained_timed_and_finetuned(corpus, other_text, tmp_path, capsys):
    words = lab_words(corpus)
    words += ["--depths=1,2", f"--finetune={other_text}", "--finetune_steps=2", f"--out={tmp_path}"]
    shapes.main(words)
    table = json.loads((tmp_path / "shapes.json").read_text())["shapes"]
    assert [its["depth"] for its in table] == [1, 2] and all(its["tokens_per_second"] > 0 for its in table)
    assert all(0 < its["finetuned"] != its["loss"] for its in table)
    assert "best after finetuning: width" in capsys.readouterr().out


def test_the_transfer_law_finds_the_exponents_that_rows_were_made_from(few_draws):
    """Pretrained models whose losses are those of D_F + 2000 D_F^0.3 N^0.2 tokens from scratch."""
    law, scratch, tuned = TRUE["kaplan"], [], []

    def trial(body, tokens, data):
        loss = float(law.loss(body, data))
        return law_trials.Trial(Config(vocab_size=257), "", {"body": body}, tokens, 1.0, loss)

    for body in (1e5, 1e6, 1e7):
        scratch += [trial(body, tokens, tokens) for tokens in np.geomspace(1e4, 1e8, 17)]
        tuned += [trial(body, tokens, tokens + 2000 * tokens**0.3 * body**0.2)
                  for tokens in np.geomspace(1e4, 1e7, 7)]
    report = transfer.analyze(scratch, tuned)
    for name, value in {"k": 2000, "alpha": 0.3, "beta": 0.2}.items():
        found, (low, high) = report["exponents"][name]
        assert found == pytest.approx(value, rel=0.1 if name != "k" else 0.5) and low < high
    assert report["unified_error"] < 0.01


def test_a_model_better_than_any_from_scratch_has_no_effective_data():
    tokens, losses = np.array([1e4, 1e5, 1e6]), np.array([5.0, 4.0, 3.0])
    assert transfer.data_equivalent(tokens, losses, 4.0) == pytest.approx(1e5)
    assert np.isnan(transfer.data_equivalent(tokens, losses, 2.9))
    assert 1e5 < transfer.data_equivalent(tokens, losses, 3.5) < 1e6


def test_transfer_pretrains_finetunes_and_fits_by_one_command(corpus, other_text, tmp_path, few_draws, capsys,
                                                              monkeypatch):
    words = lab_words(corpus) + [
        "width,depth=16x1,32x1", f"--finetune={other_text}", "--finetune_steps=2,4",
        "--finetune_lrs=2**-8", f"--out={tmp_path}/out"]
    transfer.main(words)
    rows = read_trials(f"{tmp_path}/out")
    starts = [json.loads(row["config"])["init_from"] for row in rows]
    assert len(rows) == 8 and starts.count(None) == 4 and not any(row["failure"] for row in rows)
    monkeypatch.setattr(transfer, "draw_transfer_law", lambda report, folder: f"{folder}/transfer_law.png")
    laws.main([f"{tmp_path}/out", "--transfer"])
    first, again = capsys.readouterr().out.split("transfer_law.png")[:2]
    assert "D_T is known for" in first and first.split("D_F")[1:2] == again.split("D_F")[1:2]
