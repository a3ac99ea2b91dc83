"""microRTS on 8 x 8 cells against a rush of light units, which takes a sixth of the steps; the catastrophe is the same."""

from __future__ import annotations

from sb3_qa.study.tasks.microrts import task

TASK = task("microrts_light", "microRTS 8x8, LightRush (base or game lost)", "ai.abstraction.LightRush", 80_000)
