"""Predicted round times by board, as a plot."""

from __future__ import annotations

from pathlib import Path

from reft_edge.simulation.results.figures import SERIES, drawing
from reft_edge.simulation.sizes.records import FORMS, SizeRun, SizeSettings


def draw(path: Path, settings: SizeSettings, runs: list[SizeRun]) -> None:
    """A panel for each model, a row for each board, a point for each form; seconds, logarithmic."""
    models = [model for model in settings.models if any(run.model == model for run in runs)]
    with drawing(path, columns=len(models), width=3.8, height=4.2) as panels:
        for axes, model in zip(panels, models, strict=True):
            for series, form in zip(SERIES, FORMS, strict=False):
                run = next((run for run in runs if (run.model, run.form) == (model, form)), None)
                times = {} if run is None else {one.board: one.round_s for one in run.boards if one.round_s is not None}
                rows = [settings.boards.index(board) for board in times]
                axes.scatter(list(times.values()), rows, s=28, label=form, **series.points)
            axes.axvline(settings.deadline_s, color="black", linewidth=1, linestyle=":", label="deadline")
            axes.set_xscale("log")
            axes.set_xlabel("predicted seconds of a round")
            axes.set_yticks(range(len(settings.boards)), settings.boards if axes is panels[0] else [])
            axes.set_ylim(len(settings.boards) - 0.5, -0.5)
            axes.set_title(model)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
