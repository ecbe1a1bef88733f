"""What all settings of an architecture have in common: strict types, and one way to read them from a configuration."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcast.errors import ModelError
from fedcast.models.base import ModelConfig


class Settings(BaseModel):
    """Base of an architecture's settings: :attr:`ModelConfig.settings` by name, checked.

    Class attributes
    ----------------
    method
        Name of the method whose model it is, for messages.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    method: ClassVar[str] = ""

    @classmethod
    def read(cls, config: ModelConfig) -> Self:
        """Read the settings of a configuration.

        Raises
        ------
        ModelError
            When a setting is unknown or its value is refused.
        """
        try:
            return cls.model_validate(dict(config.settings))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            hint = f"use the settings of {cls.method}"
            raise ModelError(f"setting {where} = {first['input']!r} is refused: {first['msg']}", hint=hint) from error
