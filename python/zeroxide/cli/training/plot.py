"""The loss curve as a PNG, drawn by a program of its own: matplotlib's memory is not the training process's.

Run by path with two arguments, the JSONL log and the file to write. A step that was repeated after a resume counts
with its last value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_LONGEST_AVERAGE = 10


def read(log: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Return the training and the held-out losses in `log`, by step."""
    training: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the line a killed process was writing
        losses = {"step": training, "eval": held_out}.get(event.get("event", ""))
        if losses is not None and event.get("loss") is not None:
            losses[int(event["step"])] = float(event["loss"])
    return dict(sorted(training.items())), dict(sorted(held_out.items()))


def smoothed(values: list[float]) -> list[float]:
    """Return the exponential moving average of `values`, corrected for its start at zero.

    It looks back over a tenth of the run, and over ten steps at most: the average of a falling curve lies above it by
    what the curve fell in that time, which in a short run would be much of the picture.
    """
    kept = 1 - 1 / min(_LONGEST_AVERAGE, max(1.0, len(values) / 10))
    average, result = 0.0, []
    for count, value in enumerate(values, 1):
        average = kept * average + (1 - kept) * value
        result.append(average / (1 - kept**count))
    return result


def draw(log: Path, image: Path) -> None:
    """Draw the curves in `log` into `image`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training, held_out = read(log)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(list(training), list(training.values()), color="#b8c4d6", linewidth=1, label="training")
        axes.plot(list(training), smoothed(list(training.values())), color="#1f4e9c", linewidth=2, label="smoothed")
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o", color="#c2410c", markersize=5, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if training or held_out:
        axes.legend(frameon=False)
    figure.savefig(image, dpi=120, format="png")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
