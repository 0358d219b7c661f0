"""The layer grid as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from softprompt_registry.verbalization.patching import EMBEDDINGS, LayerPair

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heatmap(title: str, values: Mapping[LayerPair, float]) -> Figure:
    """A square for each layer pair, sources down and targets across, with a ring around the best one.

    Args:
        values: for instance `LayerGrid.mean_scores("train")`; pairs that are missing stay white.
    """
    import numpy as np
    from matplotlib.figure import Figure

    sources, targets = (sorted(set(layers)) for layers in zip(*values, strict=True))
    grid = np.full((len(sources), len(targets)), np.nan)
    for pair, value in values.items():
        grid[sources.index(pair.source), targets.index(pair.target)] = value
    best = max(values, key=values.__getitem__)
    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    axes.plot(
        targets.index(best.target), sources.index(best.source), "o", markersize=11, fillstyle="none", color="#e45756"
    )
    for axis, layers in ((axes.xaxis, targets), (axes.yaxis, sources)):
        shown = range(0, len(layers), max(len(layers) // 12, 1))
        axis.set_ticks(list(shown), [_name(layers[place]) for place in shown])
    axes.set(
        title=f"{title}\nbest: source {_name(best.source)}, target {_name(best.target)}, {values[best]:.2f}",
        xlabel="target layer",
        ylabel="source layer",
    )
    figure.colorbar(image)
    return figure


def _name(layer: int) -> str:
    return "emb." if layer == EMBEDDINGS else str(layer)
