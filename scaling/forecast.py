"""Forecast the loss of a large model from two to four small ones of one setting, equal steps and batch."""

import numpy as np

EXPONENTS = np.linspace(0.03, 1.5, 50)  # r of L = E + A N^-r
USUAL_EXPONENT, SPREAD = 0.35, 0.4  # the prior on r: log-normal, median and standard deviation of ln r
OFF_LAW = 0.004  # nats: how far a size lies off the law besides seed noise, standard deviation
COVERAGE = 0.025, 0.5, 0.975


def forecast(points, target, noise, degrees):
    """(low, middle, high), nats: the loss of one training at `target`, (width, depth), and its 95% interval.

    points: [(width, depth, parameters, loss, standard error)], two different sizes at least. noise: standard
    deviation of one training over seeds, pooled, with `degrees` of freedom.

    The law is L = E + A N^-r with N = depth width^2, the parameters of the blocks. Two or three small sizes
    do not settle r, and E even less; so for each r of EXPONENTS, E and A are fitted by least squares, and the
    forecasts are averaged with the prior on r times the likelihood of the points. The interval thus holds
    what is not known of the form, the errors of the points, OFF_LAW and the seed noise of the target.
    scaling/results/README.md, "A forecast from the proxy", says how often it held."""
    from scipy.special import stdtr
    x = np.log([depth * width**2 for width, depth, *_ in points])
    loss, error = np.array([point[-2:] for point in points], dtype=float).T
    off_law, x_target = OFF_LAW**2, np.log(target[1] * target[0]**2)
    chi_squared = fit_exponents(x, loss, error**2 + off_law, x_target)[-1]
    misfit = max(1.0, chi_squared.min() / max(1, len(points) - 2))  # where no r goes through the points
    off_law = misfit * (error**2 + off_law) - error**2
    middles, variances, likelihoods, _ = fit_exponents(x, loss, error**2 + off_law, x_target)
    prior = np.exp(-(np.log(EXPONENTS / USUAL_EXPONENT) / SPREAD)**2 / 2) / EXPONENTS
    share = prior * np.exp(likelihoods - likelihoods.max())
    scales = np.sqrt(variances + noise**2 + off_law.mean())
    grid = np.linspace((middles - 12 * scales).min(), (middles + 12 * scales).max(), 1_001)
    below = stdtr(degrees, (grid[:, None] - middles) / scales) @ (share / share.sum())
    return tuple(float(np.interp(part, below, grid)) for part in COVERAGE)


def fit_exponents(x, loss, variance, x_target):
    """(loss at x_target, its variance, log likelihood, chi squared), each for all EXPONENTS, of the line
    L = c + a u(x) by weighted least squares. u, which falls as exp(-r x), is 1 at the smallest size and 0 at
    the largest: so c and a mean the same for each r."""
    def u(at):
        return np.expm1(-r * (at - x.max())) / np.expm1(-r * (x.min() - x.max()))
    r = EXPONENTS[:, None]
    u_points, u_target, weight = u(x), u(x_target)[:, 0], 1 / variance
    s, su, suu = weight.sum(), u_points @ weight, u_points**2 @ weight
    sl, sul = weight @ loss, u_points @ (weight * loss)
    determinant = s * suu - su**2
    a = (s * sul - su * sl) / determinant
    c = (suu * sl - su * sul) / determinant
    chi_squared = (loss - c[:, None] - a[:, None] * u_points)**2 @ weight
    predicted = (suu - 2 * u_target * su + u_target**2 * s) / determinant
    return c + a * u_target, predicted, -(np.log(determinant) + chi_squared) / 2, chi_squared
