"""What a user may set: flags, then MOESTRO_ variables, then defaults.

The only reader of the environment. Knows no HTTP and no model: it hands an `EngineConfig` down.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .hub_name import HUB_FORM, HubName, hub_name
from .keys import parse_keys, read_keys
from .model_name import is_gguf_name, model_name
from .origins import parse_origins
from .refusal import Refused

if TYPE_CHECKING:
    from moestro.engine import EngineConfig

DEMO = "demo"
ENV_PREFIX = "MOESTRO_"
DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")
AUTO = "auto"  # one of these, by the memory that is there
EXPERT_FORMATS = ("native", "int8", "int4", "mxfp4", "fp8", "nf4")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_SIZE_FORM = "a size above 0 such as 16MiB, 2GiB, 500MB or a number of bytes"
_COUNT_FORM = "a whole number above 0"
_MOST_BYTES = (1 << 63) - 1
_SHOWN_CHARS = 100
ExpertsMode = Literal["token", "sequence"]
DENSITY = 0.5  # of the experts, that a prompt keeps in mode sequence
LEAST_STEP_TOKENS = 16  # as many sequences run together, each decodes one token a step


def parse_size(value: object) -> object:
    """'16MiB' -> 16777216; plain digits are bytes. ValueError where it is no size above 0."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or (match[2] and not value.strip().lower().endswith("b")):
        raise ValueError(f"{_shown(value)} is not {_SIZE_FORM}")
    power = " kmgt".index((match[2] or " ").lower())
    size_bytes = float(match[1]) * (1024 if match[3] else 1000) ** power
    if size_bytes > _MOST_BYTES:
        raise ValueError(f"{_shown(value)} is more than any machine has")
    return int(size_bytes)


def _shown(value: object) -> str:
    """A value as a message repeats it: whole, unless it would drown the message."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _expanded(path: Path) -> Path:
    """Absolute, with ~ replaced. ValueError where there is no such user."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{_shown(str(path))}: no user here has that home folder") from None


def _is_model(path: Path) -> bool:
    """A folder, or a GGUF file. ValueError where the system does not even want to look."""
    try:
        return path.is_dir() or (path.is_file() and is_gguf_name(path.name))
    except OSError as error:
        raise ValueError(f"cannot read {_shown(str(path))}: {error.strerror}") from None


_LINK_FORM = "a speed above 0, and a latency if you like, such as 12GB/s or 25GB/s,20us"
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms)")


def parse_link(value: object) -> object:
    """'12GB/s,20us' -> (12e9 bytes per second, 2e-5 seconds). ValueError where it is none."""
    if not isinstance(value, str):
        return value
    speed, comma, latency = value.partition(",")
    match = _LATENCY.fullmatch(latency.strip())
    size = _SIZE.fullmatch(speed.strip().removesuffix("/s"))
    if not speed.strip().endswith("/s") or size is None or (comma and match is None):
        raise ValueError(f"{_shown(value)} is not {_LINK_FORM}")
    try:
        found = parse_size(speed.strip().removesuffix("/s"))
    except ValueError:
        found = 0
    if not isinstance(found, int) or found <= 0:
        raise ValueError(f"{_shown(value)} is not {_LINK_FORM}")
    unit_s = {"us": 1e-6, "ms": 1e-3}
    return found, float(match[1]) * unit_s[match[2]] if match else 0.0


LinkSpeed = Annotated[tuple[int, float], BeforeValidator(parse_link)]
Bytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0, description=_SIZE_FORM)]
Count = Annotated[int, Field(gt=0, description=_COUNT_FORM)]
StepTokens = Annotated[
    int, Field(ge=LEAST_STEP_TOKENS, description=f"a whole number from {LEAST_STEP_TOKENS} on")
]
# As one string each, where they come from a variable: JSON is nobody's key.
Keys = Annotated[
    tuple[SecretStr, ...], NoDecode, BeforeValidator(parse_keys), Field(description="a key")
]
KeysOfFile = Annotated[
    tuple[SecretStr, ...], NoDecode, BeforeValidator(read_keys), Field(description="a file of keys")
]
Origins = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(parse_origins), Field(description="origins")
]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, description="seconds above 0")]


class Places(BaseSettings):
    """What every command needs to know of this machine."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, env_ignore_empty=True)

    cache_dir: Path = Field(Path("~/.cache/moestro"), validate_default=True, description="a folder")

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if not str(value).strip():  # to a path, an empty name is the current folder
            raise ValueError(f"{value!r} is not a folder")
        return value

    @field_validator("cache_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        found = _expanded(value)
        try:
            in_the_way = [p for p in (found, *found.parents) if p.exists() and not p.is_dir()]
        except OSError as error:
            raise ValueError(f"cannot read {_shown(str(found))}: {error.strerror}") from None
        if in_the_way:
            raise ValueError(f"{_shown(str(in_the_way[0]))} is not a folder")
        return found


class Settings(Places):
    """Each field is one flag and one variable; its description is the expected form."""

    model: str
    host: str = Field("127.0.0.1", min_length=1, description="a host name or an address")
    port: int = Field(8000, ge=0, le=65535, description="a port number from 0 to 65535")
    device: str = "cpu"
    emulate_link: LinkSpeed | None = Field(None, description=_LINK_FORM)
    device_memory: Bytes | None = None
    host_memory: Bytes | None = None
    kv_memory: Bytes | None = None
    expert_format: str = "native"
    dense_format: Literal["native", "int8"] = Field(
        "native", description="a dense format (native, int8)"
    )
    experts_per_token: Count | None = None
    experts_tau: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    experts_mode: ExpertsMode | None = Field(
        None, description="who chooses experts (token, sequence)"
    )
    experts_density: float | None = Field(
        None, gt=0, le=1, description="a share of the experts, above 0 and at most 1"
    )
    prefetch: bool = Field(True, description="true or false")
    host_compute: bool = Field(True, description="true or false")
    prefetch_experts: Count = Field(
        1, description="a whole number above 0 (--no-prefetch loads none ahead)"
    )
    threads: Count | None = None
    max_model_len: Count | None = None
    max_step_tokens: StepTokens | None = None
    served_model_name: str | None = Field(
        None, min_length=1, max_length=256, description="a name of 1 to 256 characters"
    )
    api_key: Keys = ()
    api_key_file: KeysOfFile = ()
    allow_origin: Origins = ()

    # No flags: nobody needs them on the first day, an operator may.
    max_body: Bytes = 4 << 20
    keep_alive: Seconds = 15.0
    idle_timeout: Seconds = 75.0  # longer than clients and proxies keep a connection for reuse
    head_timeout: Seconds = 20.0
    body_timeout: Seconds = 60.0
    max_connections: Count = 1024
    # Nothing moves within a step, and one over a slow disk can take minutes: an engine that is
    # slow must not be taken for one that hangs.
    stuck_after: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds above 0 (more than the longest step takes)",
    )
    drain_grace: Seconds = 30.0

    @field_validator("model")
    @classmethod
    def _model_exists(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(f"{value!r} is neither '{DEMO}' nor a checkpoint's folder")
        place = _expanded(Path(value))
        if value == DEMO or _is_model(place):
            return value
        if place.exists() or hub_name(value) is None:
            raise ValueError(
                f"there is no folder {_shown(value)} ('{DEMO}', a checkpoint's folder, a GGUF file,"
                f" or a hub's name as {HUB_FORM})"
            )
        return value

    @field_validator("expert_format")
    @classmethod
    def _format_exists(cls, value: str) -> str:
        kind, _, file = value.partition(":")
        if kind == "mixed" and file:
            return f"mixed:{_expanded(Path(file))}"
        if value not in EXPERT_FORMATS and value != AUTO:
            known = ", ".join((*EXPERT_FORMATS, AUTO, "mixed:FILE"))
            raise ValueError(f"{_shown(value)} is not an expert format ({known})")
        return value

    @field_validator("threads")
    @classmethod
    def _threads_have_cores(cls, value: int | None) -> int | None:
        """The start knows what the process may use of them, and refuses the rest."""
        most = os.cpu_count() or 1
        if value is not None and value > most:
            raise ValueError(
                f"{_shown(value)} threads are too many for {most} logical CPUs; the most is {most}"
            )
        return value

    @field_validator("device")
    @classmethod
    def _device_exists(cls, value: str) -> str:
        if not DEVICES.fullmatch(value):
            raise ValueError(f"{value!r} is not served; what exists: auto, cpu, cuda, cuda:N")
        return value

    @field_validator("device_memory")
    @classmethod
    def _no_device_tier(cls, value: int | None, others: ValidationInfo) -> int | None:
        on_cpu = others.data.get("device") == "cpu"
        if value is not None and on_cpu and others.data.get("emulate_link") is None:
            raise ValueError(
                "device cpu has no memory of its own to hold experts; they live in host memory "
                "(--host-memory) and on disk. To measure what a device would do: --emulate-link; "
                "to compute on a GPU: --device cuda"
            )
        return value

    @property
    def is_demo(self) -> bool:
        return self.model == DEMO

    @property
    def hub_name(self) -> HubName | None:
        """None for the demo and for a folder, which wins over a hub's model of the same name."""
        return None if self.is_demo or _is_model(self.model_path) else hub_name(self.model)

    @property
    def model_path(self) -> Path:
        return _expanded(Path(self.model))

    @cached_property  # asked for with each request
    def served_name(self) -> str:
        """What clients call the model; never a path of this machine, nor a commit."""
        if self.served_model_name or self.is_demo:
            return self.served_model_name or DEMO
        named = self.hub_name
        return model_name(self.model_path) if named is None else named.repo_id

    @property
    def keys(self) -> frozenset[str]:
        """Each of which opens; empty where none is needed."""
        return frozenset(key.get_secret_value() for key in (*self.api_key, *self.api_key_file))

    def density_kept(self, own: float) -> float:
        """Of a prompt that chooses experts without a word on how many; `own`: the model's, or 0."""
        return self.experts_density or own or DENSITY

    def to_engine_config(self) -> "EngineConfig":
        from moestro.engine import EngineConfig, LinkSpec  # bring torch: once it is decided

        return EngineConfig(
            model_path=self.model_path,
            cache_dir=self.cache_dir,
            device=self.device,
            expert_format=self.expert_format,
            dense_format=self.dense_format,
            host_memory_bytes=self.host_memory,
            device_memory_bytes=self.device_memory,
            link=None if self.emulate_link is None else LinkSpec(*self.emulate_link),
            kv_memory_bytes=self.kv_memory,
            experts_per_token=self.experts_per_token,
            experts_tau=self.experts_tau,
            sequence_density=self.density_kept(0.0) if self.experts_mode == "sequence" else None,
            prefetch=self.prefetch,
            host_compute=self.host_compute,
            prefetch_experts=self.prefetch_experts,
            threads=self.threads,
            max_model_len_tokens=self.max_model_len,
            max_step_tokens=self.max_step_tokens,
        )


# Read by scripts of this repository, not by the program.
SCRIPTS_VARIABLES = ("TORCH", "BENCH_DIR", "BENCH_PEERS", "CI_BUDGET_S")


def misspelt_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """One line for each variable with our prefix that no setting has; None: the process's own."""
    known = [f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields]
    others = {f"{ENV_PREFIX}{name}" for name in SCRIPTS_VARIABLES}
    lines = []
    for name in sorted(os.environ if environment is None else environment):
        if not name.upper().startswith(ENV_PREFIX) or name.upper() in {*known, *others}:
            continue
        near = get_close_matches(name.upper(), known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}?" if near else ""
        lines.append(f"{name} is no setting and changes nothing; {hint}")
    return lines


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GROWING_SEGMENTS = "expandable_segments:True"


def prepare_allocator(device: str, environment: MutableMapping[str, str] | None = None) -> None:
    """Before torch is imported: on a GPU, buffers of many lengths shall not leave gaps.

    What a user has set stays. `environment` None: the process's own.
    """
    own = os.environ if environment is None else environment
    if device != "cpu" and not any(name in own for name in ALLOCATOR_VARIABLES):
        own[ALLOCATOR_VARIABLES[0]] = GROWING_SEGMENTS


def load_settings(flags: Mapping[str, object]) -> Settings:
    """Flags win over variables, variables over defaults. Refused names the first bad value."""
    try:
        settings = Settings(**flags)  # type: ignore[arg-type]
    except ValidationError as error:
        raise Refused(_in_one_line(error.errors()[0], flags)) from None
    if settings.emulate_link is not None and settings.device.startswith("cuda"):
        raise Refused(
            "--emulate-link: it imagines a device beside the cpu, and --device cuda has a real one;"
            " leave one of them out"
        )
    if settings.emulate_link is not None and settings.device_memory is None:
        raise Refused(
            "--emulate-link: how much the device behind the link holds is missing, such as"
            " --device-memory 1GiB"
        )
    return settings


def load_places(cache_dir: str | None) -> Places:
    """Refused names the bad value."""
    try:
        return Places() if cache_dir is None else Places(cache_dir=Path(cache_dir))
    except ValidationError as error:
        flags = {} if cache_dir is None else {"cache_dir": cache_dir}
        raise Refused(_in_one_line(error.errors()[0], flags)) from None


def _in_one_line(error: ErrorDetails, flags: Mapping[str, object]) -> str:
    field = str(error["loc"][0])
    name = f"--{field.replace('_', '-')}" if field in flags else f"{ENV_PREFIX}{field.upper()}"
    if field == "model":
        name = "MODEL"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    form = Settings.model_fields[field].description or _form_of(field)
    shown = "the value" if field.startswith("api_key") else _shown(error["input"])
    return f"{name}: {shown} is not {form}"


def _form_of(field: str) -> str:
    """The form of an optional size or count, whose description sits inside its union."""
    schema = Settings.model_json_schema()["properties"][field]
    forms = [part["description"] for part in schema.get("anyOf", [schema]) if "description" in part]
    return forms[0] if forms else "of the expected form"
