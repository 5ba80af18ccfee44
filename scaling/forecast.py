"""Forecast the loss of a large model from two to four small ones of one setting, equal steps and batch."""

import numpy as np

EXPONENTS = np.linspace(0.02, 1.5, 75)  # r of L = E + A N^-r
USUAL_EXPONENT, SPREAD = 0.35, 0.5  # the prior on r: log-normal, median and standard deviation of ln r
OFF_LAW = 0.008  # nats: how far a size lies off the law besides seed noise, standard deviation
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
    weight = 1 / (error**2 + OFF_LAW**2)
    x_target = np.log(target[1] * target[0]**2)
    fits = [fit_at(r, x, loss, weight, x_target) for r in EXPONENTS]
    middles, variances, likelihoods = np.array(fits).T
    prior = np.exp(-(np.log(EXPONENTS / USUAL_EXPONENT) / SPREAD)**2 / 2) / EXPONENTS
    share = prior * np.exp(likelihoods - likelihoods.max())
    share /= share.sum()
    scales = np.sqrt(variances + noise**2 + OFF_LAW**2)
    grid = np.linspace((middles - 12 * scales).min(), (middles + 12 * scales).max(), 2_001)
    below = stdtr(degrees, (grid[:, None] - middles) / scales) @ share
    return tuple(float(np.interp(part, below, grid)) for part in COVERAGE)


def fit_at(r, x, loss, weight, x_target):
    """(loss at x_target, its variance, log likelihood) of L = c + a u(x) fitted to the points. u,
    which falls as exp(-r x), is 1 at the smallest size and 0 at the largest:
    so c and a mean the same for each r."""
    def u(at):
        return np.expm1(-r * (at - x.max())) / np.expm1(-r * (x.min() - x.max()))
    columns = np.stack([np.ones_like(x), u(x)], axis=1)
    covariance = np.linalg.inv(columns.T * weight @ columns)
    found = covariance @ (columns.T * weight @ loss)
    row = np.array([1.0, u(x_target)])
    residual = loss - columns @ found
    likelihood = (np.linalg.slogdet(covariance)[1] - weight @ residual**2) / 2
    return row @ found, row @ covariance @ row, likelihood
