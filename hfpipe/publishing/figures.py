"""What the report and `Run.plot` draw: losses and rewards by step, the scorecard and the needles as heat maps."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hfpipe.evaluation.scorecard import Scorecard
    from hfpipe.publishing.report import StageStory


def shade(score: float) -> tuple[int, int, int]:
    """The heat map's colour as red, green and blue of 255: from a pale sand at 0 to a full teal at 1."""
    low, high = (247, 240, 228), (92, 184, 170)
    return tuple(round(a + (b - a) * score) for a, b in zip(low, high, strict=True))


def curves_svg(stages: list[StageStory]) -> str:
    """The curves as SVG; an empty text where no stage has any."""
    return _svg(lambda figure: draw_curves(figure, stages))


def needles_svg(stages: list[StageStory]) -> str:
    """The needle's heat maps as SVG; an empty text where no stage was asked for it."""
    return _svg(lambda figure: draw_needles(figure, stages))


def _svg(draw: Callable[[Figure], bool]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text, and the same run gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hfpipe"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        if not draw(figure):
            return ""
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None}, transparent=True)
    text = picture.getvalue()
    return text[text.index("<svg") :]


def build_figure(stages: list[StageStory], card: Scorecard) -> Figure:
    """The curves above the heat map. A notebook shows the figure where it is a cell's last value."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:  # a Figure that pyplot did not make has none of its own
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=80)
            return picture.getvalue()

    heights = [3.2, 0.7 + 0.3 * len(card.capabilities)]
    figure = Picture(figsize=(9, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    draw_curves(above, stages)
    draw_heat_map(below.subplots(), card)
    return figure


def draw_curves(figure: Any, stages: list[StageStory]) -> bool:
    """All stages' losses on one time line, and beside them the rewards of reinforcement; False where there are none."""
    # The loss of reinforcement says nothing of how well it goes: it is about 0 from the first step.
    colours = {stage.name: f"C{number}" for number, stage in enumerate(s for s in stages if s.curve)}
    panels = [
        (draw, chosen)
        for draw, chosen in (
            (_draw_losses, [s for s in stages if s.curve and not s.rewards]),
            (_draw_rewards, [s for s in stages if s.rewards]),
        )
        if chosen
    ]
    if not panels:
        return False
    width_ratios = [3, 2][: len(panels)]
    for axes, (draw, chosen) in zip(
        figure.subplots(1, len(panels), squeeze=False, width_ratios=width_ratios)[0], panels, strict=True
    ):
        draw(axes, chosen, colours)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=len(chosen), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return True


def _draw_losses(axes: Any, stages: list[StageStory], colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    start = 0
    for stage in stages:
        colour = colours[stage.name]
        steps = [start + step for step, _ in stage.curve]
        axes.plot(steps, [loss for _, loss in stage.curve], color=colour, linewidth=1.4, label=stage.name)
        if stage.held_out:
            axes.plot(
                *zip(*((start + s, loss) for s, loss in stage.held_out), strict=True), "o", color=colour, markersize=3
            )
        after = stage.metrics.get("validation", {}).get("loss")
        start += stage.metrics.get("steps", stage.curve[-1][0])
        if after is not None and math.isfinite(after):
            axes.plot([start], [after], "D", color=colour, markersize=5, markeredgecolor="white")
        axes.axvline(start, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set(xlabel="step, one stage after the other", ylabel="loss (nats per token)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _draw_rewards(axes: Any, stages: list[StageStory], colours: dict[str, str]) -> None:
    for stage in stages:
        axes.plot(*zip(*stage.rewards, strict=True), color=colours[stage.name], linewidth=1.4, label=stage.name)
    axes.set(xlabel="step", ylabel="mean reward of what was sampled")


def draw_needles(figure: Any, stages: list[StageStory]) -> bool:
    """A needle in a haystack: depth down, length across, side by side for the stages; False where none was asked."""
    asked = [stage for stage in stages if stage.needle]
    if not asked:
        return False
    for axes, stage in zip(figure.subplots(1, len(asked), squeeze=False, sharey=True)[0], asked, strict=True):
        lengths, depths, cells = (stage.needle[key] for key in ("lengths", "depths", "cells"))
        axes.imshow([[shade(c["score"]) if c else (255, 255, 255) for c in row] for row in cells], aspect="auto")
        for (y, row), x in itertools.product(enumerate(cells), range(len(lengths))):
            text = f"{row[x]['score']:.2f}" if row[x] else "\N{EN DASH}"
            axes.text(x, y, text, ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=stage.name, xlabel="length (tokens)")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.axes[0].set_ylabel("depth of the needle")
    return True


def draw_heat_map(axes: Any, card: Scorecard) -> None:
    """Capabilities down, stages across: the share right, with an arrow where the stage changed it beyond the interval."""
    white = (255, 255, 255)
    cells = [[card.cells.get((stage, name)) for stage in card.stages] for name in card.capabilities]
    if cells:
        axes.imshow([[shade(cell.score) if cell else white for cell in row] for row in cells], aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell:
                axes.text(x, y, f"{cell.arrow} {cell.score:.2f}".strip(), ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(card.stages)), card.stages)
    axes.set_yticks(range(len(card.capabilities)), [name.replace("_", " ") for name in card.capabilities])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
