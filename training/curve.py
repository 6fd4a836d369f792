"""The loss curve as a picture."""

from __future__ import annotations

import csv
from math import nan
from pathlib import Path

__all__ = ["draw"]


def draw(log: Path, picture: Path) -> None:
    """`log`: the loss.csv of a run; `picture`: an SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "grok-local"  # the same curve is the same file
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(log.open()))
    steps = [int(row["step"]) for row in rows]
    figure, (loss, balance) = plt.subplots(
        2, 1, figsize=(8, 5), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    written = [float(row["answers"]) or nan for row in rows]  # none while the head learns alone
    loss.plot(steps, written, label="answers, nats per token")
    loss.plot(steps, [float(row["loss"]) for row in rows], label="all parts, weighted", alpha=0.6)
    loss.set_yscale("log")
    loss.grid(alpha=0.3)
    loss.legend()
    minutes = float(rows[-1]["seconds"]) / 60
    loss.set_title(f"Training of the built-in model: {steps[-1]} steps, {minutes:.0f} minutes on 2 CPU cores")
    balance.plot(steps, [float(row["balance"]) for row in rows], color="tab:green")
    balance.set_ylabel("load balance\n(1 is even)")
    balance.set_xlabel("step")
    balance.grid(alpha=0.3)
    figure.savefig(picture, metadata={"Date": None})
