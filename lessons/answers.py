"""What is right in the exercises of the notebooks, apart from them: (whether an answer is right, a hint).

The first argument of a check is the answer, the others what the notebook gives to LAB.grade().
"""

import numpy as np

EXERCISES = {
    # Lab 1
    "1.1": (lambda octaves, moved: abs(octaves - moved["sp"]) < 0.1,
            "it is a difference of two numbers in the column 'best log2' of sp, and negative if the best "
            "rate falls"),
    "1.2": (lambda lowest: abs(lowest([-8, -7, -6], [2.3, 2.0, 2.1]) + 6.75) < 1e-6,
            "the derivative 2 a x + b is zero there"),
    "1.3": (lambda nats, SP: abs(nats - SP["sizes"][-1]["regret"]) < 0.01,
            "the last column of the table of sp, in the row of width 256"),
    "1.4": (lambda nats, dots: abs(nats - (dots[-5.0] - min(dots.values()))) < 0.002,
            "the loss at -5.0 minus the smallest of all values"),
    "1.5": (lambda log2_lr, best, SP: abs(log2_lr - (best["sp"][-1] + 2 * SP["drift"])) < 0.4,
            "from the best at width 256, go on by the drift for each doubling"),
    "1.6": (lambda exponent: exponent == -1,
            "the change is about lr times the width; keep that constant"),
    # Lab 2
    "2.1": (lambda pair: tuple(pair) == (-1, -0.5),
            "divide the entry at width 512 by the one at width 64, and write it as a power of 8"),
    "2.2": (lambda role, wrong: role == wrong,
            "the first row from the top that is off, logits left out, is of one role"),
    "2.3": (lambda product, sees_the_error: sees_the_error(product),
            "multiply two entries of hyperparameters(replace(config, width=width), role); from width 64 to "
            "512 that must give a ratio of 1 under the right table, and 1/8 under the wrong one"),
    "2.4": (lambda octaves: abs(octaves + 3 * 0.106) < 0.05, "three times the drift; its sign counts"),
    "2.5": (lambda role: role == "norm",
            "like the gain of a norm in a block it multiplies channels and is in every block; what does "
            "depth do to such gains?"),
    "2.6": (lambda needs: needs is False,
            "which dimension does y = W x sum over: the inputs or the outputs?"),
    # Lab 3
    "3.1": (lambda ratio: ratio == 16,
            "a matrix has as many inputs and outputs as the width, or a multiple of it, each"),
    "3.2": (lambda files: tuple(files) == ("target.py", "best.py"),
            "first what you want, then how it is trained: later files override earlier ones"),
    "3.3": (lambda share: share(2.0, 2.2, [2.1, 2.3]) == 0.5 and share(1, 2, [3, 4, 5]) == 0,
            "the mean of low <= loss <= high"),
    "3.4": (lambda octaves: abs(octaves - 2 * 0.297) < 0.06, "128 is two doublings of 32"),
    "3.5": (lambda octaves: abs(octaves + 2 * 0.106) < 0.05, "two doublings, by the drift of the steps"),
    # Lab 4
    "4.1": (lambda flops: abs(flops / (6 * 200_000 * 800 * 512) - 1) < 0.02,
            "N is 200,000; D is steps x tokens of a step"),
    "4.2": (lambda p, steps, loss: abs(p + np.polyfit(np.log(steps), np.log(loss), 1)[0]) < 0.005,
            "log loss = constant - p log steps"),
    "4.3": (lambda p: abs(p - 0.05**2) < 1e-9, "each falls outside with probability 0.05"),
    "4.4": (lambda use: use is False, "compare 0.02 with the largest residual"),
    "4.5": (lambda factor, iso: abs(np.log(factor) / np.log(100) - iso["exponent"]) < 0.03,
            "100 to the power p"),
}
