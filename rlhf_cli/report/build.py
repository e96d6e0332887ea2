"""A run folder -> one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.journal.run_dir import RunDir, write_atomic
from rlhf_cli.report.page import page
from rlhf_cli.report.plots import CHARTS, chart_svg
from rlhf_cli.report.record import load


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run that is finished, stopped or still going; to its `report.html` unless `out` is given.

    Raises:
        UsageError: There is no such folder.
    """
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir}: no such run folder; `rlhf ls` lists runs")
    run = RunDir(run_dir)
    record = load(run)
    charts = [(chart, chart_svg(chart, record)) for chart in CHARTS if record.measured(chart.names[0])]
    target = out or run.report
    write_atomic(target, page(record, charts).encode("utf-8"))
    return target
