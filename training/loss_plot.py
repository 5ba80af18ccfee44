"""The picture of a run, loss.png: training and validation loss over the steps, the learning rate below."""

import io
import math

FEWEST_STEPS = 10  # fewer make no curve
MOST_POINTS = 250  # of the training loss: of more steps each point is a mean of several
START = 0.05  # of the steps: their losses, many times the later ones, may lie above the picture
TRAIN, VALIDATION, LEARNING_RATE = "#0072b2", "#d55e00", "#000000"  # of Okabe and Ito: told apart by everyone


def steps_to_draw(rows):
    """Those of `rows`, of metrics.csv as dicts, that are of an optimizer step with a finite loss."""
    return [row for row in rows if math.isfinite(row.get("train_loss", math.nan))]


def draw_loss(rows, name):
    """The picture of the run `name` as the bytes of a PNG of 900 x 600 pixels. rows: of metrics.csv as dicts,
    with FEWEST_STEPS or more steps_to_draw(). Raises ImportError where matplotlib is not installed."""
    # Neither pyplot nor its settings: a notebook that trains keeps its own
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    trained = steps_to_draw(rows)
    evaluated = [row for row in rows
                 if row["step"] > 0 and math.isfinite(row.get("val_loss", math.nan))]
    draw_losses(above, trained, evaluated)
    below.plot(column(trained, "step"), column(trained, "lr"), color=LEARNING_RATE, linewidth=1.5)

    above.set_title(name)
    if evaluated:
        last = evaluated[-1]
        above.set_title(f"{name}: validation loss {last['val_loss']:.3f} after {last['step']:,} steps")
    above.set_ylabel("loss, nats per token")
    below.set_ylim(bottom=0)
    below.set_ylabel("learning rate")
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    below.set_xlabel("optimizer steps")
    for axes in above, below:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def draw_losses(axes, trained, evaluated):
    """Both losses over the steps. trained, evaluated: rows that have the training, the validation loss."""
    each = math.ceil(len(trained) / MOST_POINTS)
    label = "training" if each == 1 else f"training, means of {each} steps"
    axes.plot(means(column(trained, "step"), each), means(column(trained, "train_loss"), each), color=TRAIN,
              linewidth=1, label=label)
    axes.errorbar(column(evaluated, "step"), column(evaluated, "val_loss"),
                  [row.get("val_error", 0.0) for row in evaluated], color=VALIDATION, marker="o",
                  markersize=5, linewidth=1.5, capsize=2, label="validation, ± standard error")
    axes.set_ylim(*loss_limits(trained, evaluated))
    axes.legend(frameon=False)


def column(rows, name):
    return [row[name] for row in rows]


def means(values, each):
    """The mean of each `each` values in a row; the last may be of fewer."""
    groups = [values[i:i + each] for i in range(0, len(values), each)]
    return [sum(group) / len(group) for group in groups]


def loss_limits(trained, evaluated):
    """(lowest, highest) loss that the picture shows: all but those of the first steps, and of a run that
    diverges those up to twice the first."""
    start = START * trained[-1]["step"]
    losses = column([row for row in trained if row["step"] >= start], "train_loss")
    losses += column([row for row in evaluated if row["step"] >= start], "val_loss")
    low, high = min(losses), min(max(losses), 2 * trained[0]["train_loss"])
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
