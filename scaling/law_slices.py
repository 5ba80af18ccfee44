"""Simpler looks at the same trials than a law of N and D: isoFLOP parabolas (Chinchilla's approach 2), the
frontier of loss against compute, and the loss of the longest runs against N (Kaplan's L(C) and L(N))."""

import numpy as np

from scaling.fits import power_law
from scaling.law_fits import DRAWS, interval_of

BUDGETS = 6  # where the trials do not lie on budgets of their own
NEAR = np.log(3)  # in log N
SAME_BUDGET = 0.05  # FLOPs that differ by less are one budget: steps are whole numbers


def cell_means(keys, losses):
    """{key: mean loss}, sorted by key."""
    found = {}
    for key, loss in zip(keys, losses, strict=True):
        found.setdefault(key, []).append(loss)
    return {key: float(np.mean(found[key])) for key in sorted(found)}


def noisy(loss, sigma, seed=2):
    """Draws of `loss`, each number with relative noise `sigma`: what is fitted to them shows its own
    noise."""
    random = np.random.default_rng(seed)
    return [loss * np.exp(random.normal(0, sigma, len(loss))) for _ in range(DRAWS)]


def power_with_interval(x, y, draws):
    """{exponent, interval, factor} of y = factor * x^exponent; draws: other (x, y) that might have been."""
    exponent, _, factor = power_law(x, y)
    return {"exponent": float(exponent), "factor": float(factor),
            "interval": interval_of([power_law(*draw)[0] for draw in draws])}


def frontier(flops, loss):
    """(FLOPs, loss) of the trials that no trial with fewer FLOPs equals."""
    lowest, kept = np.inf, []
    for c, mean in cell_means(flops, loss).items():
        if mean < lowest:
            lowest = mean
            kept.append((c, mean))
    return np.array(kept).T


def frontier_law(flops, loss, sigma):
    """L(C), a power law through the frontier; None where that has fewer than 3 points."""
    x, y = frontier(flops, loss)
    draws = [frontier(flops, drawn) for drawn in noisy(loss, sigma)]
    if len(x) < 3 or any(len(draw[0]) < 3 for draw in draws):
        return None
    return power_with_interval(x, y, draws) | {"flops": list(x), "loss": list(y)}


def largest_horizon_law(N, D, loss, sigma):
    """L(N), a power law through the models of the largest number of tokens that at least 3 models have; None
    where there is none."""
    for tokens in sorted(set(D), reverse=True):
        chosen = tokens == D
        if len(set(N[chosen])) >= 3:
            break
    else:
        return None

    def points(drawn):
        means = cell_means(N[chosen], drawn[chosen])
        return np.array([*means]), np.array([*means.values()])
    return power_with_interval(*points(loss), [points(drawn) for drawn in noisy(loss, sigma)]) | {
        "tokens": float(tokens)}


def budgets_of(curves):
    """FLOPs at which to compare models: where at least 3 of them lie together, else evenly between all."""
    every = np.sort(np.concatenate([flops for flops, _, _ in curves.values()]))
    groups = np.split(every, np.flatnonzero(np.diff(np.log(every)) > SAME_BUDGET) + 1)
    together = [float(np.exp(np.log(group).mean())) for group in groups if len(group) >= 3]
    if len(together) >= 2:
        return together
    return list(np.geomspace(every[0], every[-1], BUDGETS + 2)[1:-1])


def model_curves(N, D, flops, loss):
    """{N: (FLOPs, log loss, tokens)} of each model, in the order of its horizons."""
    means = cell_means(zip(N, flops, D, strict=True), loss)
    curves = {}
    for (n, c, d), mean in means.items():
        curves.setdefault(n, []).append((c, np.log(mean), d))
    return {n: tuple(np.array(points).T) for n, points in curves.items()}


def isoflop_points(curves, budget):
    """[(N, loss, tokens)] at a budget, between the horizons of each model that has some on both sides."""
    points = []
    for n, (flops, log_loss, tokens) in curves.items():
        if flops[0] * (1 - SAME_BUDGET) <= budget <= flops[-1] * (1 + SAME_BUDGET):
            at = np.log(budget)
            loss = np.exp(np.interp(at, np.log(flops), log_loss))
            points.append((n, float(loss), float(budget * np.exp(np.mean(np.log(tokens / flops))))))
    return points


def parabola(points):
    """{N, loss, tokens, coefficients in log N} of the lowest point, where it lies between the models; None
    elsewhere. Only models near the lowest are fitted: further away the curve is no parabola."""
    n, loss, tokens = np.array(points).T
    lowest = int(np.argmin(loss))
    if lowest == 0 or lowest == len(n) - 1:
        return None
    near = np.abs(np.log(n / n[lowest])) <= NEAR
    near[lowest - 1:lowest + 2] = True
    a, b, c = np.polyfit(np.log(n[near]), loss[near], 2)
    if a <= 0:
        return None
    best = -b / (2 * a)
    return {"N": float(np.exp(best)), "loss": float(c - b * b / (4 * a)), "coefficients": [a, b, c],
            "tokens": float(np.exp(np.interp(best, np.log(n), np.log(tokens))))}


def optima(N, D, flops, loss):
    """[{flops, points, best}] of each budget at which at least 3 models can be compared."""
    curves, found = model_curves(N, D, flops, loss), []
    for budget in budgets_of(curves):
        points = isoflop_points(curves, budget)
        if len(points) >= 3:
            found.append({"flops": budget, "points": points, "best": parabola(points)})
    return found


def exponent_of_optima(budgets):
    """The exponent of N_opt in C; nan where fewer than two budgets have an optimum."""
    points = [(its["flops"], its["best"]["N"]) for its in budgets if its["best"]]
    if len(points) < 2:
        return np.nan
    return power_law(*np.array(points).T)[0]


def isoflop(N, D, flops, loss, sigma):
    """{budgets, exponent, interval}: the parabolas and how N_opt grows with the FLOPs."""
    budgets = optima(N, D, flops, loss)
    drawn = np.array([exponent_of_optima(optima(N, D, flops, other)) for other in noisy(loss, sigma)])
    drawn = drawn[np.isfinite(drawn)]
    interval = interval_of(drawn) if len(drawn) > DRAWS / 2 else [np.nan, np.nan]
    return {"budgets": budgets, "exponent": float(exponent_of_optima(budgets)), "interval": interval}
