"""What the settings share: how the environment is read, and one line for each mistake in it."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict


class InvalidSettings(ValueError):
    """The settings cannot be worked with, or would put the service at risk; the message says what to change."""


class EnvironmentSettings(BaseSettings):
    """Frozen settings. The ``alias`` of a field is its variable, the ``description`` says what it must be."""

    model_config = SettingsConfigDict(frozen=True, case_sensitive=True, enable_decoding=False, validate_default=False)

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave out the environment of this process and .env files: `from_environment` is given what to read."""
        return (sources["init_settings"],)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **given: Any) -> Self:
        """Read ``environment``, where an empty variable counts as none; ``given`` wins. Raises SettingsRefused."""
        source = EnvSettingsSource(cls)
        source.env_vars = {name: text for name, text in environment.items() if text}
        try:
            return cls(**{**source(), **given})
        except ValidationError as error:
            wanted = {field.alias: field.description for field in cls.model_fields.values() if field.alias}
            raise InvalidSettings("\n".join(_error_lines(error, wanted))) from None


def _error_lines(error: ValidationError, wanted: Mapping[str, str | None]) -> list[str]:
    """One line each. Never the value: it may hold a password."""
    found = {str(one["loc"][0]): one for one in error.errors(include_url=False, include_input=False)}
    lines = []
    for name, one in found.items():
        match one:
            case {"type": "default_factory_not_called"}:  # made of another setting, which has a line of its own
                continue
            case {"type": "literal_error", "ctx": {"expected": str(words)}}:
                lines.append(f"{name} must be {words.replace(chr(39), '').replace(', ', ' or ')}")
            case {"ctx": {"error": InvalidSettings() as why}}:
                # Without a variable of its own, the field is read from several, and the error names them.
                lines.append(f"{name} {why}" if name in wanted else str(why))
            case _:
                lines.append(f"{name} {wanted[name]}")
    return lines


def split_commas(text: str) -> list[str]:
    """Split at commas; blanks around a part and empty parts do not count."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_decimal(given: int | str) -> int:
    # int() also takes signs, blanks and underscores.
    if isinstance(given, str) and not given.isdecimal():
        raise ValueError(given)
    return int(given)


WholeNumber = Annotated[int, BeforeValidator(_parse_decimal), Field(description="must be a whole number")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, description="must be a number of seconds")]
