"""The curve of a run: fvu and loss, of training batches and of held-out texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("mtllm_fast")


def plot_curve(log: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw a Trainer's log into ``path``; without matplotlib say so and return False."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no curve is drawn: matplotlib is missing (pip install 'mtllm-fast[bench]')")
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name, label in zip(figure.subplots(1, 2), ("fvu", "loss"), ("unexplained variance", "loss"), strict=True):
        for key, style, of in ((name, "-", "training batches"), (f"eval_{name}", "o-", "held-out texts")):
            points = [(line["step"], line[key]) for line in log if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=of, markersize=3)
        axes.set(xlabel="step", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    aside = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(aside, dpi=120)
    aside.replace(path)
    return True
