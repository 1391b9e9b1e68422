"""Draw the extension's icon, KA2ERSegment.png beside this file: a structure, its contour, a click of each polarity."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

INK, TISSUE, MASK, POSITIVE, NEGATIVE = "#10202c", "#6d8796", "#f2b134", "#3fbf7f", "#e4572e"

angle = np.linspace(0, 2 * np.pi, 400)
radius = 0.55 + 0.07 * np.cos(3 * angle + 0.6) + 0.03 * np.sin(5 * angle)  # an organ-like outline
figure = plt.figure(figsize=(1.28, 1.28), dpi=100)
axes = figure.add_axes((0, 0, 1, 1))
axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
axes.axis("off")
axes.add_patch(plt.Circle((0, 0), 0.97, color=INK))
axes.add_patch(plt.Circle((0, 0), 0.84, color=TISSUE))
axes.fill(radius * np.cos(angle), radius * np.sin(angle), facecolor=MASK, alpha=0.55)
axes.plot(radius * np.cos(angle), radius * np.sin(angle), color=MASK, linewidth=3)
axes.scatter([-0.05], [0.05], s=70, color=POSITIVE, edgecolors="white", linewidths=1.5, zorder=3)
axes.scatter([0.62], [-0.42], s=45, color=NEGATIVE, edgecolors="white", linewidths=1.2, zorder=3)
figure.savefig(Path(__file__).with_name("KA2ERSegment.png"), transparent=True, metadata={"Software": None})
