"""What a server is told: where it listens and what it allows. Free of torch, for the command line."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from craton.compression.quantize_settings import parse_bytes
from craton.config import Settings
from craton.errors import UsageError

if TYPE_CHECKING:
    from craton.serving.pictures import PicturePolicy


class ServeSettings(Settings):
    """Address, keys, limits and logs of one server, by flags or in a TOML file."""

    host: str = Field("127.0.0.1", description="address to listen on; any but this machine's own needs keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: a free one)")
    api_key_file: Path | None = Field(None, description="file of hashed keys (craton serve key add NAME makes it)")
    load: Literal["start", "use"] = Field("start", description="load models at the start, or each on its first use")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="the largest request body")
    max_upload_bytes: int = Field(25 << 20, ge=1024, description="the largest sound file, with its form around it")
    image_urls: Literal["off", "https", "http"] = Field(
        "off",
        description="fetch pictures from public addresses that requests name: never, by https, or by http as well",
    )
    max_image_bytes: int = Field(20 << 20, ge=1024, description="the largest picture file")
    max_images: int = Field(16, ge=1, description="pictures in one request")
    max_tokens: int = Field(8192, ge=1, description="the longest answer that may be asked for, in tokens")
    default_max_tokens: int = Field(1024, ge=1, description="the longest answer of a chat that asks for no length")
    max_choices: int = Field(16, ge=1, le=128, description="answers that one request may ask for")
    max_batch: int = Field(256, ge=1, description="prompts, texts or documents in one request")
    concurrency: int = Field(
        16, ge=1, description="requests that are answered at once, and answers in an engine at once"
    )
    queue: int = Field(128, ge=0, description="requests that wait for their turn; more are refused (429)")
    request_timeout: float = Field(600.0, gt=0, description="seconds that a request may take, waiting included (504)")
    send_buffer: int = Field(2048, ge=16, description="tokens that a slow reader may lag behind before it is cut off")
    drain: float = Field(
        20.0, ge=0, description="seconds that running answers get to finish when the server is stopped"
    )
    memory: str | None = Field(
        None,
        description="memory that loaded models may take, such as 8GB (weights, and keys and values): the one that was "
        "used longest ago is unloaded when another needs room (none: no limit)",
    )
    kv: Literal["auto", "int8"] = Field(
        "auto", description="how keys and values are kept: as computed (auto), or in 8 bits for half the memory (int8)"
    )
    log_prompts: bool = Field(False, description="write prompts and answers into the log")

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @property
    def pictures(self) -> PicturePolicy:
        """What pictures a request may bring."""
        from craton.serving.pictures import PicturePolicy  # numpy, which the command line does without

        return PicturePolicy(
            urls=self.image_urls != "off",
            http=self.image_urls == "http",
            most=self.max_images,
            file_bytes=self.max_image_bytes,
        )

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else parse_bytes(self.memory)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(settings: ServeSettings) -> None:
    """Raises UsageError for an address that others can reach, without keys."""
    if settings.api_key_file is None and not is_loopback(settings.host):
        raise UsageError(
            f"{settings.host} can be reached by others, and there are no keys",
            where="--host",
            remedy="craton serve key add NAME --api-key-file FILE, then serve with --api-key-file FILE",
        )
