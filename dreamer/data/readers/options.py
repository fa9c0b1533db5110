"""How the options of a reader are checked: ``@check_options`` above its ``__init__`` holds them against their annotations."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, validate_call

from dreamer.types import ActionSpace

check_options = validate_call(config=ConfigDict(extra="forbid"))  # forbid: unknown keys of an action's components, too

# also the list of components that ActionSpace.to_json gives, as a config holds it
ActionSpaceOption = Annotated[ActionSpace, BeforeValidator(lambda value: {"components": value} if isinstance(value, list) else value)]
