"""Find and load the compiled kernels (cpp/), or say in one line why there are none.

The package build compiles cpp/ into `_kernels.*` beside this file when it finds a C++ compiler. The library has a plain
C interface (cpp/craton_native.h), so any Python loads it, with ctypes, which releases the interpreter lock in calls.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

from craton.errors import UnknownName, UsageError

ABI_VERSION = 5  # CRATON_ABI_VERSION
OK, BAD_ARGUMENT, NO_MEMORY = 0, 1, 2  # craton_status
ISAS = ("avx512vnni", "avx2", "portable")


class Weight(ctypes.Structure):
    """craton_weight: what a packed matrix is, for C."""

    _fields_ = (("data", c_void_p), ("rows", c_int64), ("columns", c_int64), ("format", c_int32))


# Pointers are passed as plain integers: the cheapest argument ctypes knows.
_SIGNATURES = {
    "craton_isa": ((), c_char_p),
    "craton_select_isa": ((c_char_p,), c_int32),
    "craton_packed_bytes": ((c_int32, c_int64, c_int64), c_int64),
    "craton_pack": ((c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32), c_int32),
    "craton_linear": (
        (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_int64, c_int32, c_int32),
        c_int32,
    ),
    "craton_has_tiles": ((), c_int32),
    "craton_step": ((c_void_p, c_void_p, c_void_p, c_void_p, c_int32), c_int32),
    "craton_rows": ((c_void_p, c_void_p, c_int64, c_void_p, c_int32, c_int32), c_int32),
}


def load(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library in `folder` and "", or None and the reason."""
    found = sorted(folder.glob("_kernels*.so")) + sorted(folder.glob("_kernels*.dylib"))
    if not found:
        return (
            None,
            "the native kernels were not built; reinstall craton where a C++ compiler (g++ or clang++) is found",
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        version = library.craton_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{found[0].name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return (
            None,
            f"{found[0].name} was built from other sources (version {version}, not {ABI_VERSION}); reinstall craton",
        )
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library, ""


_library, _reason = load(Path(__file__).parent)


def available() -> bool:
    """Whether the compiled kernels are here."""
    return _library is not None


def reason() -> str:
    """Why `available()` is False, in one line; empty when it is True."""
    return _reason


def library() -> ctypes.CDLL:
    """The loaded library. Raises UsageError if there is none."""
    if _library is None:
        raise UsageError("the native kernels are not available", remedy=_reason)
    return _library


def isa() -> str:
    """The instruction set that the kernels use on this CPU: one of `ISAS`."""
    return str(library().craton_isa().decode())


def has_tiles() -> bool:
    """Whether this CPU has a matrix unit that the kernels can use (Intel's AMX), for products in bfloat16."""
    return available() and bool(library().craton_has_tiles())


def select_isa(name: str) -> None:
    """Use another instruction set from now on. For tests: the results are the same bits, only slower.

    Raises UnknownName if there is no such one on this CPU.
    """
    if library().craton_select_isa(name.encode()) != OK:
        raise UnknownName("instruction set on this CPU", name, ISAS)
