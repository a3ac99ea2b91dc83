"""microRTS on 8 x 8 cells against a rush of light units, which takes an eighth of the steps; the catastrophe is the same.

The rush is ahead by up to 300 cycles, most of what it needs for its first light unit: an agent that is never late wins every game,
and there would be nothing to veto.
"""

from __future__ import annotations

from sb3_qa.study.tasks.microrts import task

TASK = task(
    "microrts_light",
    "microRTS 8x8, LightRush (base or game lost)",
    "ai.abstraction.LightRush",
    timesteps=65_536,
    learning_rate=7e-4,
    solved=7.0,
    latest_start=300,
)
