"""The way through the house: recordings -> tokenizer -> latents -> world model -> agent -> imagination -> evaluation -> report."""

from dreamer.pipeline.run import Run
from dreamer.pipeline.stages import STAGES, run_all, run_stage

__all__ = ["STAGES", "Run", "run_all", "run_stage"]
