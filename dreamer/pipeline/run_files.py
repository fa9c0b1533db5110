"""What is read of the files in a run's ``evaluation/``, which may come from elsewhere. Other keys may stand beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dreamer.data.files import read_json
from dreamer.evaluation.agent import AgentResult
from dreamer.evaluation.latent_dreams import LatentResult
from dreamer.evaluation.report import Role
from dreamer.evaluation.video import WorldModelResult


class WorldModelFile(BaseModel):
    result: WorldModelResult
    training: WorldModelResult | None = None


class LatentFile(BaseModel):
    result: LatentResult
    training: LatentResult | None = None


class Row(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)  # the videos of a result are arrays

    label: str
    role: Role
    mode: Literal["sampled", "argmax"] | None
    result: AgentResult


class AgentFile(BaseModel):
    rows: list[Row]


class Stage(BaseModel, extra="allow"):
    seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_memory_mb: float = Field(ge=0, allow_inf_nan=False)


class SpentFile(BaseModel, extra="allow"):
    """run.json of a run that may not be finished."""

    command: str = ""
    hardware: dict[str, str] = Field(default_factory=dict)
    revisions: list[str | None] = Field(default_factory=list)
    stages: dict[str, Stage]


class Hardware(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, str]

    CPU: str
    threads: str


class RunFile(BaseModel):
    command: str = ""
    hardware: Hardware
    versions: dict[str, str] = Field(default_factory=dict)
    revisions: list[str | None] = Field(default_factory=list)
    stages: dict[str, Stage] = Field(min_length=1)


FileT = TypeVar("FileT", WorldModelFile, LatentFile, AgentFile, SpentFile, RunFile)


def read_file(path: Path, kind: type[FileT], remedy: str) -> FileT:
    """``ValueError`` names the file and the remedy if it does not hold what is read of it."""
    try:
        return kind.model_validate(read_json(path, remedy))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}); {remedy}") from error
