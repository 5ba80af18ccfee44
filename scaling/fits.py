"""Fits to the losses of a sweep: where they are lowest, how that moves, how they fall with size."""

import math
import statistics

import numpy as np

POWER_LAW_ERROR = 0.08


def optimum(losses, octaves=1.0, seeds=None):
    """(log2 of the best x, its loss, curvature, standard error of the first for each nat of noise in a single
    loss) of {x: loss}, from a parabola in log2 x through the points within so many octaves of the lowest, its
    two neighbours at least. seeds: {x: how many single losses its loss is the mean of}, 1 by default.

    None where the lowest is at an edge of the grid, or next to a trial that diverged."""
    points = sorted((x, loss if np.isfinite(loss) else np.inf) for x, loss in losses.items())
    x, loss = np.array(points).T
    best = int(np.argmin(loss))
    at_edge = best == 0 or best == len(x) - 1
    if at_edge or not np.isfinite(loss[best - 1:best + 2]).all():
        return None
    offset = np.log2(x) - np.log2(x[best])
    fitted = np.abs(offset) <= octaves + 0.01  # room for rounding
    fitted[best - 1:best + 2] = True
    fitted &= np.isfinite(loss)
    a, b, c = np.polyfit(offset[fitted], loss[fitted], 2)
    if a <= 0:
        return None
    by_loss = np.array([b / (2 * a * a), -1 / (2 * a), 0]) @ np.linalg.pinv(np.vander(offset[fitted], 3))
    variances = [1 / seeds[value] if seeds else 1.0 for value in x[fitted]]
    return np.log2(x[best]) - b / (2 * a), c - b * b / (4 * a), a, float(np.sqrt(by_loss**2 @ variances))


def lowest_end(losses):
    """The end of the grid at which the loss of {x: loss} is lowest; None where it is lower in between, or
    there is a single x."""
    lowest = min(losses, key=losses.get)
    return lowest if len(losses) > 1 and lowest in (min(losses), max(losses)) else None


def mean_and_error(losses):
    """(mean, standard error of the mean); the error is nan for one loss, and the mean infinite for none."""
    mean = sum(losses) / len(losses) if losses else math.inf
    if len(losses) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(losses) / math.sqrt(len(losses))


def average_seeds(losses):
    """({x: mean loss}, sum of squares, degrees of freedom) of {x: {seed: loss}}, all finite: a loss is what
    its x, its seed and noise contribute, by least squares. So the mean is that over all seeds where some were
    not trained at an x, and the squares are of noise alone."""
    points = [(x, seed, loss) for x, by_seed in losses.items() for seed, loss in by_seed.items()]
    seeds = sorted({seed for _, seed, _ in points})
    design = [[x == other for other in losses] + [seed == other for other in seeds] for x, seed, _ in points]
    loss = np.array([loss for *_, loss in points])
    found, _, rank, _ = np.linalg.lstsq(np.array(design, float), loss)
    residual = loss - np.array(design, float) @ found
    means = found[:len(losses)] + found[len(losses):].mean()
    return dict(zip(losses, means.tolist(), strict=True)), residual @ residual, len(loss) - int(rank)


def t_quantile(freedom):
    """How many standard errors the middle 95% reach to either side; nan of no degree of freedom."""
    from scipy.stats import t
    return float(t.ppf(0.975, freedom)) if freedom else np.nan


def regret(best, losses, x):
    """What training at log2 x costs, in nats, compared with the optimum `best`: by its parabola within an
    octave, by interpolation in {x: loss} further away. None beyond the grid."""
    best_x, best_loss, curvature, _ = best
    if abs(x - best_x) <= 1:
        return curvature * (x - best_x) ** 2
    grid, loss = zip(*sorted((np.log2(k), y) for k, y in losses.items()), strict=True)
    if not grid[0] <= x <= grid[-1]:
        return None
    return float(np.interp(x, grid, loss) - best_loss)


def slope(optima):
    """(octaves that the best x moves for each doubling of the size, its standard error for each nat of noise)
    of {size: optimum() or None}; nan where fewer than two sizes have an optimum."""
    found = [(np.log2(size), best[0], best[3]) for size, best in optima.items() if best]
    if len(found) < 2:
        return np.nan, np.nan
    size, best_x, errors = np.array(found).T
    weights = (size - size.mean()) / np.sum((size - size.mean()) ** 2)
    return float(weights @ best_x), float(np.sqrt(weights**2 @ errors**2))


def interval(numbers):
    """[low, high]: the middle 95% of the finite `numbers`; nan if there are none."""
    finite = [number for number in numbers if np.isfinite(number)]
    if not finite:
        return [np.nan, np.nan]
    return list(np.percentile(finite, (2.5, 97.5)))


def power_law(x, y):
    """(exponent, its standard error, prefactor) of y = prefactor * x^exponent, by least squares in logs."""
    x, y = np.log(x), np.log(y)
    exponent, offset = np.polyfit(x, y, 1)
    residual = y - exponent * x - offset
    error = np.sqrt(residual @ residual / max(1, len(x) - 2) / ((x - x.mean()) @ (x - x.mean())))
    return exponent, error, np.exp(offset)


def follows_power_law(x, y):
    """Whether the points lie on a power law: three or more, and none further off it, in logarithms, than
    POWER_LAW_ERROR of what y varies by. A loss that bends, as it does towards its floor, is off by more."""
    if len(set(x)) < 3:
        return False
    exponent, _, factor = power_law(x, y)
    off = np.log(y) - np.log(factor) - exponent * np.log(x)
    return bool(np.abs(off).max() <= POWER_LAW_ERROR * np.ptp(np.log(y)))


def rank_correlation(x, y):
    """Spearman's, infinite values last; nan for fewer than three, or where all are alike."""
    from scipy.stats import rankdata
    ranks = [rankdata(np.where(np.isfinite(values), values, np.inf)) for values in (x, y)]
    if len(x) < 3 or min(np.ptp(values) for values in ranks) == 0:
        return np.nan
    return float(np.corrcoef(*ranks)[0, 1])


def rank_interval(rank, count):
    """[low, high], 95%, of a rank_correlation(), by Bonett and Wright (2000); nan for under four pairs."""
    if count < 4 or np.isnan(rank):
        return [np.nan, np.nan]
    error = np.sqrt((1 + rank**2 / 2) / (count - 3))
    middle = np.arctanh(np.clip(rank, -1 + 1e-9, 1 - 1e-9))
    return list(np.tanh([middle - 1.96 * error, middle + 1.96 * error]))
