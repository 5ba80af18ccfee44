"""Fits to the losses of a sweep: where they are lowest, how that moves, how they fall with size."""

import numpy as np


def optimum(losses):
    """(log2 of the best x, its loss, curvature) of {x: loss}, or None where the lowest is at an edge, of the
    grid or of what trains. The parabola goes through the points within an octave, at least the neighbours."""
    pairs = sorted((np.log2(x), y if np.isfinite(y) else np.inf) for x, y in losses.items())
    x, y = np.array(pairs).T
    best = int(np.argmin(y))
    near = np.abs(x - x[best]) <= 1.01
    near[max(0, best - 1):best + 2] = True
    if not 0 < best < len(x) - 1 or not np.isfinite(y[best - 1:best + 2]).all():
        return None
    near &= np.isfinite(y)
    a, b, c = np.polyfit(x[near] - x[best], y[near], 2)
    return (x[best] - b / (2 * a), c - b * b / (4 * a), a) if a > 0 else None


def mean_losses(losses, seeds):
    """{x: loss} over a draw of seeds; an x that none of them has takes the mean of all its seeds."""
    return {x: np.mean([by[s] for s in seeds if s in by] or list(by.values())) for x, by in losses.items()}


def regret(found, losses, x):
    """What log2 x costs against the optimum: by the parabola near it, between the points further off, None
    beyond them."""
    if abs(x - found[0]) <= 1:
        return found[2] * (x - found[0]) ** 2
    points = sorted((np.log2(k), y) for k, y in losses.items())
    if not points[0][0] <= x <= points[-1][0]:
        return None
    return float(np.interp(x, *zip(*points, strict=True)) - found[1])


def slope(best):
    """Octaves that the best x moves for each doubling of the axis."""
    there = [(np.log2(rung), found[0]) for rung, found in best.items() if found]
    return float(np.polyfit(*zip(*there, strict=True), 1)[0]) if len(there) > 1 else np.nan


def interval(numbers):
    numbers = [number for number in numbers if np.isfinite(number)]
    return list(np.percentile(numbers, (2.5, 97.5))) if numbers else [np.nan, np.nan]


def power_law(x, y):
    """(exponent, its standard error, prefactor) of y = prefactor * x^exponent, by least squares in logs."""
    x, y = np.log(x), np.log(y)
    exponent, offset = np.polyfit(x, y, 1)
    residual = y - exponent * x - offset
    error = np.sqrt(residual @ residual / max(1, len(x) - 2) / ((x - x.mean()) @ (x - x.mean())))
    return exponent, error, np.exp(offset)
