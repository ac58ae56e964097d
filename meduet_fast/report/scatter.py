"""Draw where crops of different domains lie in content and in style."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from meduet_fast.plotting import COLORS, MARKERS, styled, subplots
from meduet_fast.probing import FactorTable, ProbeResult


@styled
def draw_scatter(table: FactorTable, domains: list[str], separation: ProbeResult) -> Figure:
    """Draw held-out crops in the plane of the two largest principal components, content and style.

    Args:
        table: factors of the trained network.
        domains: names by domain id.
        separation: for the titles.
    """
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    figure, axes = subplots(4.6, 1, 2)
    held_out = table.rows(table.held_out)
    order = np.random.default_rng(0).permutation(len(held_out.domain))  # no domain hides the others
    for ax, name in zip(axes, ("content", "style"), strict=True):
        pca = PCA(2, random_state=0)
        points = pca.fit_transform(StandardScaler().fit_transform(getattr(held_out, name)))  # (N, 2)
        for rank, row in enumerate(order):
            color = COLORS[held_out.domain[row] % len(COLORS)]
            marker = MARKERS[held_out.domain[row] % len(MARKERS)]
            ax.plot(
                *points[row], marker, color=color, ms=4.5, alpha=0.75, mew=0, zorder=2 + rank / len(order)
            )
        first, second = 100 * pca.explained_variance_ratio_
        ax.set_xlabel(f"component 1 ({first:.0f} % of the variance)")
        ax.set_ylabel(f"component 2 ({second:.0f} %)")
        accuracy = getattr(separation.probe, name)
        ax.set_title(
            f"{name.capitalize()}: probe {100 * accuracy:.0f} % right "
            f"(chance {100 * separation.probe_chance:.0f} %)"
        )
    handles = [
        axes[0].plot([], [], MARKERS[i % len(MARKERS)], color=COLORS[i % len(COLORS)], ms=6)[0]
        for i in np.unique(held_out.domain)
    ]
    labels = [domains[i] for i in np.unique(held_out.domain)]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    return figure
