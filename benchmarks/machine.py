"""Where and when a benchmark ran."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

import numpy as np


def machine() -> dict[str, object]:
    """The processor and what can make a number differ from the next machine's; call it last, for the load."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load_average": round(os.getloadavg()[0], 1),
    }


def write(path: Path, results: dict[str, object]) -> None:
    """Write results with date and machine, for benchmarks/results."""
    report = {"date": datetime.date.today().isoformat(), "machine": machine(), **results}
    path.write_text(json.dumps(report, indent=1) + "\n")
