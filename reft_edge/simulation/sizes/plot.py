"""Predicted round times by board, as a plot."""

from __future__ import annotations

from pathlib import Path

from reft_edge.simulation.results.figures import SERIES, drawing
from reft_edge.simulation.sizes.records import FORMS, SizeRun, SizeSettings


def draw(path: Path, settings: SizeSettings, runs: list[SizeRun]) -> None:
    """A panel for each model, a group of bars for each board, one bar for each form; seconds, logarithmic."""
    models = [model for model in settings.models if any(run.model == model for run in runs)]
    thickness = 0.8 / len(FORMS)
    with drawing(path, columns=len(models), width=4.6, height=5.0) as panels:
        for axes, model in zip(panels, models, strict=True):
            for index, form in enumerate(FORMS):
                run = next((run for run in runs if (run.model, run.form) == (model, form)), None)
                if run is None:
                    continue
                seconds = [board.round_s or 0.0 for board in run.boards]
                places = [row + (index - (len(FORMS) - 1) / 2) * thickness for row in range(len(seconds))]
                axes.barh(places, seconds, height=thickness, label=form, **SERIES[index].bars)
            axes.axvline(settings.deadline_s, color="black", linewidth=1, linestyle=":", label="deadline")
            axes.set_xscale("log")
            axes.set_xlabel("predicted seconds of a round")
            axes.set_yticks(range(len(settings.boards)), settings.boards)
            axes.invert_yaxis()
            axes.set_title(model)
        panels[0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.06), ncols=len(FORMS) + 1)
