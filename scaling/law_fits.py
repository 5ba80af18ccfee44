"""Laws of the loss, fitted to trials: their forms, the fit, and how sure it is. numpy and scipy only.

A law gives the logarithm of the loss, in nats a token, for N parameters and D training tokens. It is fitted
as in Chinchilla (arXiv 2203.15556, appendix D.3) and its replication (arXiv 2404.10102): the Huber loss of
the residuals in logs, minimized from many starts; by BFGS, which finds what their L-BFGS does in a twentieth
of the time. Beside the laws, simpler looks at the same trials: isoFLOP parabolas (Chinchilla's approach 2), a
power law of the FLOPs through their minima alone, and whether the training curves have one shape.
"""

from itertools import product
from typing import NamedTuple

import numpy as np

from scaling.fits import interval, power_law
from scaling.rows import group

HUBER = 1e-3  # residuals of log loss above it count linearly: one bad trial moves the fit little
DRAWS = 200  # of a bootstrap
BEST_STARTS = 24  # of a grid of them, by the Huber loss there: from the others BFGS finds nothing lower
BUDGETS = 6  # of parabolas, where the trials do not lie on budgets of their own
NEAR = np.log(3)  # in log N: further from the best N a curve at equal FLOPs is no parabola
SAME_BUDGET = 0.05  # FLOPs that differ by less are one budget: steps are whole numbers
FEWEST_MINIMA = 4  # for a power law through them: its three constants are fitted without the largest, too
AFTER = 0.2  # of the steps: from here on training curves are compared


def log_sum(terms):
    """(log of the sum of the exponentials of `terms`, arrays, and the share of each in it)."""
    terms = np.stack(np.broadcast_arrays(*terms))
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    return top + np.log(total), shares / total


def chinchilla(theta, n, d):
    """L = E + A/N^alpha + B/D^beta: (log loss, its derivatives). theta: log A, log B, log E, alpha, beta.
    n, d: log N and log D."""
    a, b, e, alpha, beta = theta
    log_loss, (of_n, of_d, of_e) = log_sum((a - alpha * n, b - beta * d, e))
    return log_loss, np.stack((of_n, of_d, of_e, -n * of_n, -d * of_d))


def kaplan(theta, n, d):
    """L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D (arXiv 2001.08361, equation 1.5), as chinchilla().
    theta: log N_c * ratio, log D_c, ratio = alpha_N/alpha_D, alpha_D."""
    a, b, ratio, alpha_d = theta
    inner, (of_n, of_d) = log_sum((a - ratio * n, b - d))
    return alpha_d * inner, np.stack((alpha_d * of_n, alpha_d * of_d, -alpha_d * n * of_n, inner))


def kaplan_floor(theta, n, d):
    """L = E + [(A/N)^r + B/D]^a: Kaplan's form above a loss that remains. theta: that of kaplan(), log E."""
    *of_kaplan, e = theta
    above, derivatives = kaplan(of_kaplan, n, d)
    log_loss, (share, of_e) = log_sum((above, e))
    return log_loss, np.stack((*(share * derivatives), of_e))


def frontier(theta, c, _):
    """L = E + A/C^alpha: the lowest loss for C training FLOPs. theta: log A, log E, alpha. c: log C."""
    a, e, alpha = theta
    log_loss, (of_c, of_e) = log_sum((a - alpha * c, e))
    return log_loss, np.stack((of_c, of_e, -c * of_c))


def chinchilla_constants(theta, n0, d0):
    """The law's constants by name, of theta for n - n0 and d - d0. On the frontier, where N * D is in
    proportion to the FLOPs C: N grows as C to N_opt_exponent, and the loss above E falls as C to
    -L_opt_exponent. The terms of N and of D stay in proportion where D grows as N to data_exponent."""
    a, b, e, alpha, beta = theta
    return {"E": np.exp(e), "A": np.exp(a + alpha * n0), "B": np.exp(b + beta * d0), "alpha": alpha,
            "beta": beta, "N_opt_exponent": beta / (alpha + beta),
            "L_opt_exponent": alpha * beta / (alpha + beta), "data_exponent": alpha / beta}


def kaplan_constants(theta, n0, d0):
    a, b, ratio, alpha_d = theta
    return {"N_c": np.exp(a / ratio + n0), "D_c": np.exp(b + d0), "alpha_N": ratio * alpha_d,
            "alpha_D": alpha_d, "N_opt_exponent": 1 / (1 + ratio),
            "L_opt_exponent": ratio * alpha_d / (1 + ratio), "data_exponent": ratio}


def kaplan_floor_constants(theta, n0, d0):
    *of_kaplan, e = theta
    return {"E": np.exp(e)} | kaplan_constants(of_kaplan, n0, d0)


def frontier_constants(theta, c0, _):
    a, e, alpha = theta
    return {"E": np.exp(e), "A": np.exp(a + alpha * c0), "alpha": alpha}


class Form(NamedTuple):
    """A form of law: its function, the names of its constants, and values of theta to start from."""
    function: object
    constants: object
    starts: tuple  # for each part of theta


# With n and d centered on the data, the terms of a fit are near 1 and its exponents below it
TERMS, POWERS = (-2, 0, 1), (0.1, 0.3, 0.8)
FORMS = {"chinchilla": Form(chinchilla, chinchilla_constants, (TERMS, TERMS, TERMS, POWERS, POWERS)),
         "kaplan": Form(kaplan, kaplan_constants,
                        ((0, 5, 15), (0, 5, 15), (0.3, 0.7, 1.5), (0.05, 0.1, 0.3))),
         "kaplan_floor": Form(kaplan_floor, kaplan_floor_constants,
                              ((-2, 0, 2, 5), (-2, 0, 2, 5), (0.3, 0.7, 1.5), (0.1, 0.3, 0.8), TERMS))}
ALL_FORMS = FORMS | {"frontier": Form(frontier, frontier_constants, (TERMS, TERMS, POWERS))}  # N = D = C


class Law(NamedTuple):
    """A fitted law. sigma_cell, sigma_seed: standard deviations of the log loss around it, of pairs (N, D)
    and of the seeds of a pair; where no pair has two seeds, sigma_cell is of both."""
    form: str
    theta: np.ndarray
    n0: float
    d0: float
    sigma_cell: float = 0.0
    sigma_seed: float = 0.0

    def log_loss(self, N, D):
        return ALL_FORMS[self.form].function(self.theta, np.log(N) - self.n0, np.log(D) - self.d0)[0]

    def loss(self, N, D):
        """Nats a token."""
        return np.exp(self.log_loss(N, D))

    def constants(self):
        return ALL_FORMS[self.form].constants(self.theta, self.n0, self.d0)


def minimize_huber(function, starts, log_loss, *logs):
    """The theta of the lowest Huber loss that BFGS finds from the best of `starts`. function: of theta and
    `logs`, gives log loss and derivatives."""
    from scipy.optimize import minimize

    def objective(theta):
        predicted, derivatives = function(theta, *logs)
        residual = predicted - log_loss
        slope = np.clip(residual, -HUBER, HUBER)
        value = np.sum(slope * residual - slope**2 / 2)
        return value / HUBER**2, derivatives @ slope / HUBER**2

    with np.errstate(all="ignore"):  # a start far off may overflow; it then loses
        finite = [start for start in starts if np.isfinite(objective(start)[0])]
        nearest = sorted(finite, key=lambda start: objective(start)[0])[:BEST_STARTS]
        found = [minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-3})
                 for start in nearest]
    return min((one for one in found if np.isfinite([one.fun, *one.x]).all()), key=lambda one: one.fun).x


def fit_law(form, N, D, loss, starts=None):
    """The Law of `form` for arrays of a number for each trial. starts: thetas, or None for a grid of them."""
    log_n, log_d, log_loss = np.log(N), np.log(D), np.log(loss)
    n0, d0 = log_n.mean(), log_d.mean()
    if starts is None:
        starts = [np.array(start) for start in product(*ALL_FORMS[form].starts)]
    theta = minimize_huber(ALL_FORMS[form].function, starts, log_loss, log_n - n0, log_d - d0)
    return with_noise(Law(form, theta, n0, d0), N, D, log_loss)


def with_noise(law, N, D, log_loss):
    """`law` with the two noises that its residuals show: within pairs (N, D), by seed, and between them."""
    residual = log_loss - law.log_loss(N, D)
    cells = cell_numbers(N, D)
    counts = np.bincount(cells)
    means = np.bincount(cells, residual) / counts
    within = len(residual) - len(counts)  # degrees of freedom
    seed_variance = np.sum((residual - means[cells]) ** 2) / within if within else 0.0
    freedom = max(1, len(counts) - len(law.theta))
    cell_variance = max(0.0, np.sum(means**2) / freedom - seed_variance * np.mean(1 / counts))
    return law._replace(sigma_cell=np.sqrt(cell_variance), sigma_seed=np.sqrt(seed_variance))


def cell_numbers(N, D):
    """The number of the pair (N, D) that each trial belongs to."""
    return np.unique(np.stack((N, D)), axis=1, return_inverse=True)[1].ravel()


def redraw(loss, law, N, D, draws=None, seed=0):
    """`draws` arrays of what `loss`, of trials at N and D, might have been with both noises of the law."""
    random, cells = np.random.default_rng(seed), cell_numbers(N, D)
    for _ in range(draws or DRAWS):
        of_cells = random.normal(0, law.sigma_cell, cells.max() + 1)[cells]
        yield loss * np.exp(of_cells + random.normal(0, law.sigma_seed, len(loss)))


def bootstrap(law, N, D, draws=None):
    """Laws that might have been found: fitted to losses simulated from `law`, whose noises are those of its
    residuals. Parametric, as two or three seeds drawn with replacement show too little of their noise."""
    return [fit_law(law.form, N, D, loss, starts=[law.theta])
            for loss in redraw(law.loss(N, D), law, N, D, draws)]


def constants_with_intervals(law, laws):
    """{name: (value, [low, high])} of the law's constants; `laws`: of bootstrap()."""
    drawn = [other.constants() for other in laws]
    return {name: (float(value), interval([constants[name] for constants in drawn]))
            for name, value in law.constants().items()}


def predict(law, laws, N, D, missed=0.0):
    """(loss, [low, high]) of one new trial at N, D: the interval has the noise of the fit, by its bootstrap,
    that of the trial itself, and `missed`, nats by which such laws miss what lies beyond their fit."""
    random = np.random.default_rng(1)
    sigma = np.linalg.norm((law.sigma_cell, law.sigma_seed, missed / law.loss(N, D)))
    drawn = [other.loss(N, D) * np.exp(random.normal(0, sigma)) for other in laws for _ in range(10)]
    return float(law.loss(N, D)), interval(drawn)


def backtest(form, N, D, loss, flops, share=0.1):
    """Nats by which a law fitted to the trials of up to `share` of the largest FLOPs misses each of the
    others, which it has not seen; None where too few are left to fit."""
    small = flops <= share * flops.max()
    if small.sum() == 0 or cell_numbers(N[small], D[small]).max() + 1 < len(FORMS[form].starts) + 2:
        return None
    law = fit_law(form, N[small], D[small], loss[small])
    return loss[~small] - law.loss(N[~small], D[~small])


def missed_by(fit):
    """The root mean square of a fit's backtest(), in nats; 0 where there was none."""
    return 0.0 if fit["backtest"] is None else np.sqrt(np.mean(fit["backtest"] ** 2))


def all_tested(fits):
    """Whether each of {(form, count): fit} had a backtest(), so that they can be compared by it."""
    return all(fit["backtest"] is not None for fit in fits.values())


def misses(fits):
    """{(form, count): by how much it misses}: larger trials, when fitted to the smaller ones; where too few
    are smaller for one of the forms, the trials that it was fitted to."""
    tested = all_tested(fits)
    return {key: missed_by(fit) if tested else fit["law"].sigma_cell + fit["law"].sigma_seed
            for key, fit in fits.items()}


def cell_means(keys, losses):
    """{key: mean loss}, sorted by key."""
    cells = group(zip(keys, losses, strict=True))
    return {key: float(np.mean(cells[key])) for key in sorted(cells)}


def isoflop_budgets(flops):
    """FLOPs at which to compare models: where at least 3 trials lie together, else evenly between all."""
    every = np.sort(flops)
    groups = np.split(every, np.flatnonzero(np.diff(np.log(every)) > SAME_BUDGET) + 1)
    together = [float(np.exp(np.log(own).mean())) for own in groups if len(own) >= 3]
    if len(together) >= 2:
        return together
    return list(np.geomspace(every[0], every[-1], BUDGETS + 2)[1:-1])


def model_curves(N, D, flops, loss):
    """{N: (FLOPs, log loss, tokens)} of each model, in the order of its horizons."""
    means = cell_means(zip(N, flops, D, strict=True), loss)
    curves = group((n, (c, np.log(mean), d)) for (n, c, d), mean in means.items())
    return {n: np.array(points).T for n, points in curves.items()}


def isoflop_points(curves, budget):
    """[(N, loss, tokens)] at a budget, between the horizons of each model that has some on both sides."""
    points = []
    for n, (flops, log_loss, tokens) in curves.items():
        if flops[0] * (1 - SAME_BUDGET) <= budget <= flops[-1] * (1 + SAME_BUDGET):
            loss = np.exp(np.interp(np.log(budget), np.log(flops), log_loss))
            points.append((n, float(loss), float(budget * np.exp(np.mean(np.log(tokens / flops))))))
    return points


def parabola(points, shift=(0.0, 0.0)):
    """{N, loss, tokens, coefficients in log N} of the lowest point plus `shift`, in log N and in loss, where
    it lies between the models; None elsewhere. Only models near the lowest are fitted: further away the
    curve is no parabola."""
    n, loss, tokens = np.array(points).T
    lowest = int(np.argmin(loss))
    if lowest in (0, len(n) - 1):
        return None
    near = np.abs(np.log(n / n[lowest])) <= NEAR
    near[lowest - 1:lowest + 2] = True
    a, b, c = np.polyfit(np.log(n[near]), loss[near], 2)
    if a <= 0:
        return None
    best = shift[0] - b / (2 * a)
    return {"N": float(np.exp(best)), "loss": float(shift[1] + c - b * b / (4 * a)),
            "coefficients": [a, b, c], "tokens": float(np.exp(np.interp(best, np.log(n), np.log(tokens))))}


def isoflop_optima(N, D, flops, loss, shifts=None):
    """([{flops, points, best}] of each budget at which at least 3 models can be compared, the exponent of the
    best N in the FLOPs: nan where fewer than two budgets have a best N). shifts: of off_center()."""
    curves, budgets = model_curves(N, D, flops, loss), []
    for budget in isoflop_budgets(np.concatenate([curve[0] for curve in curves.values()])):
        points = isoflop_points(curves, budget)
        shift = (0.0, 0.0) if shifts is None else shifts.get(budget)
        if len(points) >= 3:
            best = parabola(points, shift) if shift else None
            budgets.append({"flops": budget, "points": points, "best": best})
    best = [(its["flops"], its["best"]["N"]) for its in budgets if its["best"]]
    return budgets, float(power_law(*np.array(best).T)[0]) if len(best) > 1 else np.nan


def law_frontier(law, models, budgets):
    """(N, loss) where the law is lowest at each of `budgets`, FLOPs, over sizes between and beyond those
    measured. models: {(N, FLOPs a token)}; beyond them these go as powers of each other."""
    n, per_token = np.log(sorted(models)).T
    slope, _ = np.polyfit(n, per_token, 1)
    sizes = np.linspace(n.min() - 3, n.max() + 8, 10_000)
    inside = np.clip(sizes, n.min(), n.max())
    of_sizes = np.interp(inside, n, per_token) + slope * (sizes - inside)
    loss = law.loss(np.exp(sizes), np.asarray(budgets)[:, None] / np.exp(of_sizes))
    return np.exp(sizes[loss.argmin(axis=1)]), loss.min(axis=1)


def off_center(law, N, D, flops):
    """{budget: (log N, loss)} to add to the lowest points of parabolas, so that from losses of the law itself
    they find its own. A curve at equal FLOPs is no parabola: through models most of which are smaller than
    the best, or larger, it is lowest elsewhere. So it is where a loss lies between two distant horizons."""
    budgets, _ = isoflop_optima(N, D, flops, law.loss(N, D))
    found = {its["flops"]: its["best"] for its in budgets if its["best"]}
    lowest = zip(*law_frontier(law, {*zip(N, flops / D, strict=True)}, [*found]), strict=True)
    return {budget: (np.log(n / best["N"]), loss - best["loss"])
            for (budget, best), (n, loss) in zip(found.items(), lowest, strict=True)}


def isoflop(law, N, D, flops, loss):
    """({budgets, exponent, interval}, fit_frontier()): parabolas, and how the best N grows with the FLOPs."""
    shifts = off_center(law, N, D, flops)
    budgets, exponent = isoflop_optima(N, D, flops, loss, shifts)
    drawn = [isoflop_optima(N, D, flops, other, shifts) for other in redraw(loss, law, N, D)]
    exponents = [other for _, other in drawn]
    often = np.isfinite(exponents).sum() > len(drawn) / 2
    found = {"budgets": budgets, "exponent": exponent, "interval": interval(exponents if often else [])}
    return found, fit_frontier(budgets, [budgets for budgets, _ in drawn])


def fit_frontier(budgets, drawn):
    """{law, laws, constants, shorter}: a law of the FLOPs through the lowest points of isoFLOP `budgets`, and
    through those of each of `drawn`, as other seeds might give them; shorter: without the largest budget.
    None where fewer than FEWEST_MINIMA have a lowest point."""
    minima = [[(its["flops"], its["best"]["loss"]) for its in one if its["best"]]
              for one in (budgets, *drawn)]
    if len(minima[0]) < FEWEST_MINIMA:
        return None
    (C, loss), *others = (np.array(one).T for one in minima if len(one) >= FEWEST_MINIMA)
    law = fit_law("frontier", C, C, loss)
    laws = [fit_law("frontier", c, c, other, starts=[law.theta]) for c, other in others]
    return {"law": law, "laws": laws, "constants": constants_with_intervals(law, laws),
            "shorter": fit_law("frontier", C[:-1], C[:-1], loss[:-1])}


def predict_frontier(found, C):
    """predict() of fit_frontier() for C FLOPs; its interval has what leaving out the largest budget moves."""
    moved = found["law"].loss(C, C) - found["shorter"].loss(C, C)
    return predict(found["law"], found["laws"], C, C, moved)


def collapse(law, N, D, loss, curves):
    """{models: [{N, D, curve, off}], apart, seeds}: do models of all sizes learn alike (arXiv 2507.02119)? Of
    each the horizon nearest the law's frontier, where 1% more N lowers the loss as 1% more D does. A curve is
    the training loss above E, over the final loss above E. Relative, root mean square after the warmup: how
    far a curve is `off` the median, models are `apart`, and `seeds` are. None for fewer than 3 models."""
    gains = law.loss(N, D) - np.stack((law.loss(1.01 * N, D), law.loss(N, 1.01 * D)))
    away, E = np.abs(np.log(gains[0] / gains[1])), law.constants().get("E", 0.0)
    if len(set(N)) < 3 or len({*map(len, curves)} | {0}) != 2:
        return None
    normal = (np.array(curves) - E) / (loss[:, None] - E)
    late, models, noise = slice(round(AFTER * normal.shape[1]), None), [], []
    for n in np.unique(N):
        nearest = D[N == n][np.argmin(away[N == n])]
        own = normal[(N == n) & (D == nearest)]
        models.append({"N": n, "D": nearest, "curve": own.mean(axis=0)})
        if len(own) > 1:
            noise.append(np.var(own / own.mean(axis=0), axis=0, ddof=1)[late])
    means = np.array([model["curve"] for model in models])
    off = np.sqrt(np.mean((means / np.median(means, axis=0) - 1)[:, late] ** 2, axis=1))
    apart = np.sqrt(np.mean(np.var(means / means.mean(axis=0), axis=0, ddof=1)[late]))
    return {"models": [model | {"off": one} for model, one in zip(models, off, strict=True)],
            "apart": apart, "seeds": np.sqrt(np.mean(noise)) if noise else np.nan}
