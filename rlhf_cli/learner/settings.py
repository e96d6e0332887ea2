"""What every trainer of ours is told alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_cli.recipe.schema import Recipe


def trainer_settings(recipe: Recipe, output_dir: Path) -> dict[str, Any]:
    """Arguments that the configurations of all three trainers share."""
    return {
        "output_dir": str(output_dir),
        "seed": recipe.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # weights stay float32; where products are bfloat16, it is by the policy's own autocast
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": list(recipe.logging.report_to),
        "dataloader_pin_memory": False,
        "disable_tqdm": True,  # progress is ours to show
    }
