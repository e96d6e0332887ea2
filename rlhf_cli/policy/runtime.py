"""Settings of the model libraries that have to be in place before they do any work."""

from __future__ import annotations

import os
import warnings

import datasets
import torch
import transformers


def prepare(threads: int | None) -> None:
    """Bound torch's CPU threads to `threads`, else to the cores this process may use, and keep the libraries quiet.

    On busy cores a spinning thread pool costs up to twenty times the work itself, which is why the command line also
    sets OMP_WAIT_POLICY=PASSIVE before torch is imported. Progress is ours to show: bars of the libraries would tear
    the live view apart.
    """
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
