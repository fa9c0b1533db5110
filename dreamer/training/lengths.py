"""How long the rows of a batch are: many short ones (T1) and a few long ones (T2) (Dreamer 4, Section 3.2)."""

from __future__ import annotations

from pydantic import Field, model_validator

from dreamer.types import Config


class SequenceConfig(Config):
    """Rows of ``sequence_length`` latent steps; every ``long_every``-th batch has fewer rows, of ``long_sequence_length`` steps.

    Attention reaches back ``context_length`` steps, whatever the length of a row. Only rows longer than that hold steps that no
    longer see the first one: without them the model learns that position 0 is special, and dreams go on beyond it.
    """

    sequence_length: int = Field(default=16, ge=2)  # T1: latent steps a row
    long_sequence_length: int | None = Field(default=None, ge=3)  # T2, above the dynamics' context_length; null: no long rows
    long_every: int = Field(default=8, ge=1)  # every n-th batch is long, with about as many steps in all as the others

    @model_validator(mode="after")
    def _check_lengths(self) -> SequenceConfig:
        if self.long_sequence_length is not None and self.long_sequence_length <= self.sequence_length:
            raise ValueError(
                f"long_sequence_length is {self.long_sequence_length}; expected above sequence_length = {self.sequence_length}, or null"
            )
        return self

    @property
    def longest(self) -> int:
        return self.long_sequence_length or self.sequence_length
