"""Settings: every one has a default, a `MELL_` variable and a `--flag`; a wrong one is told in one line."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from mell_shared.broker_access import BrokerAccess, Role

_SHOWN_INPUT_CHARS = 80


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


StringList = Annotated[list[str], NoDecode, BeforeValidator(_split)]
"""Several texts: the flag repeated, or one value separated by commas, or a JSON list."""


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """One setting as a manual lists it."""

    name: str
    flag: str
    variable: str
    kind: str
    default: str
    description: str


class CommandLineSettings(BaseSettings):
    """Settings that come from flags, then variables, then defaults. Subclasses set `cli_prog_name`."""

    model_config = SettingsConfigDict(
        env_prefix="MELL_",
        extra="ignore",
        cli_kebab_case=True,
        cli_prog_name="mell",
        cli_implicit_flags=True,
        cli_exit_on_error=False,
    )

    @classmethod
    def from_command_line(cls, arguments: list[str]) -> Self:
        """Return settings from flags, then variables, then defaults.

        Prints one line and exits 2 if one is wrong; prints the manual and exits 0 for `--help`.
        """
        if not {"-h", "--help"}.isdisjoint(arguments):
            sys.stdout.write(cls._manual())
            raise SystemExit(0)
        try:
            return cls(_cli_parse_args=arguments)
        except (ValidationError, SettingsError) as error:
            sys.stderr.write(f"{cls.model_config['cli_prog_name']}: {cls._one_line(error)}\n")
            raise SystemExit(2) from error

    @classmethod
    def listing(cls) -> list[SettingInfo]:
        """Return every setting in the order of declaration, inherited ones first."""
        prefix = cls.model_config["env_prefix"]
        return [
            SettingInfo(
                name=name,
                flag=f"--{name.replace('_', '-')}",
                variable=f"{prefix}{name.upper()}",
                kind=_kind(field.annotation),
                default=_default(field),
                description=field.description or "",
            )
            for name, field in cls.model_fields.items()
        ]

    @classmethod
    def _manual(cls) -> str:
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        lines = [
            f"usage: {cls.model_config['cli_prog_name']} [--flag value]...",
            "",
            summary,
            "Each setting is a flag, or the variable named beside it, or its default; the first of these wins.",
            "",
        ]
        for setting in cls.listing():
            flags = setting.flag + (f", --no-{setting.flag[2:]}" if setting.kind == "bool" else f" {setting.kind}")
            lines += [f"  {flags}", f"      {setting.description}", f"      {setting.variable}, {setting.default}"]
        return "\n".join(lines) + "\n"

    @classmethod
    def _one_line(cls, error: ValidationError | SettingsError) -> str:
        if isinstance(error, SettingsError):
            return cls._source_fault(str(error))
        fault = error.errors(include_url=False)[0]
        reason = fault["msg"].removeprefix("Value error, ")
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if name not in cls.model_fields:
            return f"{reason}; see --help"
        return f"{cls._names(name)}: {reason}, got {_shown(fault['input'])}"

    @classmethod
    def _source_fault(cls, text: str) -> str:
        """Say what is wrong with a flag or variable that could not even be read."""
        if found := re.search(r'field "(\w+)"', text):
            return f'{cls._names(found[1])}: cannot be read; a list looks like a,b or ["a", "b"]'
        if found := re.search(r"unrecognized arguments: (.*)", text):
            return f"there is no {found[1]}; see --help"
        return f"{text.removeprefix('error parsing CLI: ')}; see --help"

    @classmethod
    def _names(cls, name: str) -> str:
        return f"--{name.replace('_', '-')} (or {cls.model_config['env_prefix']}{name.upper()})"


class ServiceSettings(CommandLineSettings):
    """What every service needs to know."""

    nats_url: str = Field("nats://127.0.0.1:4222", description="Broker, with user and password if it asks for them.")
    nats_nkey_seed_file: Path | None = Field(
        None, description="File with the seed of an nkey to show the broker instead of a password."
    )
    nats_tls_ca: Path | None = Field(
        None,
        description="Authority that signed the broker's certificate; unset: the system's. A `tls://` address, "
        "or any of these files: never without TLS.",
    )
    nats_tls_cert: Path | None = Field(None, description="Certificate to show the broker, if it asks for one.")
    nats_tls_key: Path | None = Field(None, description="Its key; unset: in the same file.")
    subject_prefix: str = Field("mell", pattern=r"^[A-Za-z0-9_-]+$", description="First token of every subject.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: console on a terminal, else json."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus metrics and health over HTTP; 0: none.")
    metrics_host: str = Field("127.0.0.1", description="Interface of the metrics port.")
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://.+)?$",
        description="Collector that gets OpenTelemetry spans, by OTLP over HTTP, such as http://127.0.0.1:4318; unset: "
        "that of OTEL_EXPORTER_OTLP_ENDPOINT, else none. Needs the extra `otel`.",
    )

    def broker_access(self, role: Role) -> BrokerAccess:
        """Return how a service in this role shows the broker who it is."""
        return BrokerAccess(
            role=role,
            nkey_seed_file=self.nats_nkey_seed_file,
            tls_ca=self.nats_tls_ca,
            tls_cert=self.nats_tls_cert,
            tls_key=self.nats_tls_key,
        )


def _kind(annotation: Any) -> str:
    """Return a short word for a setting's type; choices are spelled out, None is left to the default."""
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    members = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) in (list, tuple):
        return f"{_kind(members[0])},..."
    if members:
        return "|".join(_kind(member) for member in members)
    return {str: "text", Path: "path"}.get(annotation) or str(annotation.__name__)


def _default(field: FieldInfo) -> str:
    """Return a setting's default for a manual, the same on every machine."""
    if field.default_factory is not None:
        made = field.get_default(call_default_factory=True)
        if isinstance(made, Path) and made.is_relative_to(Path.home()):
            return f"default ~/{made.relative_to(Path.home())}"
        return f"default from the machine ({getattr(field.default_factory, '__name__', 'computed')})"
    value = field.default
    if isinstance(value, bool):
        return "default on" if value else "default off"
    if isinstance(value, list | tuple):
        value = ",".join(str(part) for part in value)
    return "no default" if value is None or value == "" else f"default {value}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_INPUT_CHARS else f"{text[:_SHOWN_INPUT_CHARS]}..."
