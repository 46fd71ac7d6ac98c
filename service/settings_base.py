"""Base class of the settings: read from environment variables, with one line of error message per mistake."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL, make_url

ESCAPE = (
    'has a user, password or host that cannot be read: write "@" as %40, ":" as %3A, "/" as %2F and "%" as %25, '
    "or leave the password out of the URL and set PGPASSWORD"
)


class InvalidSettings(ValueError):
    """The settings are invalid or unsafe; the message says what to change."""


class EnvironmentSettings(BaseSettings):
    """Frozen settings. A field's ``alias`` is its environment variable; its ``description`` the error message."""

    model_config = SettingsConfigDict(frozen=True, case_sensitive=True, enable_decoding=False, validate_default=False)

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        # Without os.environ and .env files: the caller passes the environment to `from_environment`.
        return (sources["init_settings"],)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **given: Any) -> Self:
        """Read ``environment``; an empty variable counts as not set, and ``given`` wins. Raises InvalidSettings."""
        source = EnvSettingsSource(cls)
        source.env_vars = {name: text for name, text in environment.items() if text}
        try:
            return cls(**{**source(), **given})
        except ValidationError as error:
            descriptions = {field.alias: field.description for field in cls.model_fields.values() if field.alias}
            raise InvalidSettings("\n".join(_error_lines(error, descriptions))) from None


def _error_lines(error: ValidationError, descriptions: Mapping[str, str | None]) -> list[str]:
    # No line has the value: it may be a password.
    details = {str(one["loc"][0]): one for one in error.errors(include_url=False, include_input=False)}
    lines = []
    for name, detail in details.items():
        match detail:
            case {"type": "default_factory_not_called"}:  # It depends on another setting, which has its own line.
                continue
            case {"type": "literal_error", "ctx": {"expected": str(words)}}:
                lines.append(f"{name} must be {words.replace(chr(39), '').replace(', ', ' or ')}")
            case {"ctx": {"error": InvalidSettings() as reason}}:
                # A field without a variable of its own is read from several; the error names them.
                lines.append(f"{name} {reason}" if name in descriptions else str(reason))
            case _:
                lines.append(f"{name} {descriptions[name]}")
    return lines


def parse_database_url(text: str) -> URL:
    """Parse the URL of a database. Raises InvalidSettings, without any part of the URL, or ArgumentError."""
    try:
        url = make_url(text)
    except ValueError:
        raise InvalidSettings(ESCAPE) from None
    # The first "@" ends the password: the rest of it would be taken for the host, and printed as such.
    if url.drivername != "sqlite" and any("@" in part for part in (url.host or "", url.database or "")):
        raise InvalidSettings(ESCAPE)
    return url


def split_commas(text: str) -> list[str]:
    """Split at commas, strip the parts, and drop empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_decimal(value: int | str) -> int:
    # int() also takes signs, blanks and underscores.
    if isinstance(value, str) and not value.isdecimal():
        raise ValueError(value)
    return int(value)


WholeNumber = Annotated[int, BeforeValidator(_parse_decimal), Field(description="must be a whole number")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, description="must be a number of seconds")]
