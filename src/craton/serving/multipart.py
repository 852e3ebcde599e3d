"""Forms with files in them (RFC 7578), within limits."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from craton.serving.errors import ApiError

MOST_FIELDS: Final = 64
MOST_FIELD_BYTES: Final = 64 * 1024  # of a field that is no file


async def read_form(headers: Headers, raw: bytes) -> dict[str, Any]:
    """The fields of a form whose whole body is `raw`: texts, the bytes of one file, and lists where a name ends with
    []. Raises ApiError 400 for what is no form, or has too many or too large parts."""

    async def once() -> AsyncGenerator[bytes, None]:
        yield raw

    try:
        parser = MultiPartParser(headers, once(), max_files=1, max_fields=MOST_FIELDS, max_part_size=MOST_FIELD_BYTES)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        said = getattr(error, "message", "") or "there is no boundary, or it is never met"
        raise ApiError(400, f"the body is no form: {said}", code="invalid_form") from None
    values: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            found = await value.read() if isinstance(value, UploadFile) else value
            bare = name.removesuffix("[]")
            if name != bare and isinstance(values.setdefault(bare, []), list):
                values[bare].append(found)
            elif bare in values:
                raise ApiError(400, f"the field {name[:200]!r} is there twice", param=name[:200], code="invalid_form")
            else:
                values[name] = found
    finally:
        await form.close()
    return values
