"""What the probes share: a model at rest, and figures.

matplotlib is imported when a figure is asked for and not before: measuring needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unbraid.layers import device_of as device_of
from unbraid.render import shortened as shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = {"blue": "#0072B2", "orange": "#D55E00", "grey": "#666666"}  # distinct to the colour-blind


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; its mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Sequence[Any]]:
    """A figure with panels side by side, that belongs to no window.  Raises ImportError that says what to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "unbraid[plots]"') from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, list(drawn.subplots(1, panels, squeeze=False)[0])


def finish(drawn: Figure, path: str | Path | None) -> Figure:
    """Write the figure where asked (the suffix says the format) and return it."""
    if path is not None:
        drawn.savefig(path, dpi=150)
    return drawn
