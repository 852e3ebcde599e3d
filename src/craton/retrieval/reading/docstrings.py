"""The docstrings of an installed package: read from its source, so that nothing of it runs.

Only modules of the standard library that are written in C have no source; those are imported, and asked.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import inspect
import os
import pkgutil
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

from craton.errors import CratonError, UnknownName, UsageError
from craton.retrieval.documents import Document
from craton.retrieval.reading.content import clean, decode, read_bytes
from craton.retrieval.reading.source_code import Definition, parse_python, statements

PACKAGE_PREFIX: Final = "package:"

_MAX_DEPTH: Final = 6  # of re-exports that are followed, and of classes within classes


@dataclass
class Module:
    """A module of a package. path: its source, None for one in C. of: the package that was asked for."""

    name: str
    path: Path | None
    of: str

    @property
    def source_name(self) -> str:
        return f"{PACKAGE_PREFIX}{self.of}" + (f"#{self.name}" if self.name != self.of else "")

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the source; of modules in C, of their docstrings."""
        if self.path is not None and not self._borrowed:
            return hashlib.sha256(read_bytes(self.path)).hexdigest()
        # What it re-exports stands in other files: what counts is what comes out.
        whole = hashlib.sha256()
        for document in self.documents():
            whole.update(document.digest.encode())
        return whole.hexdigest()

    @cached_property
    def _borrowed(self) -> bool:
        source = _source(self.path)
        return source is not None and any(True for _ in _borrowings(source, self))

    def documents(self) -> Iterator[Document]:
        """One document for the module itself, and for each public class, function and method that has a docstring."""
        seen: set[str] = set()
        for symbol in self._symbols():
            if symbol.qualname not in seen and symbol.doc.strip():
                seen.add(symbol.qualname)
                yield self._document(symbol)

    def _symbols(self) -> Iterator[_Symbol]:
        if self.path is None:
            yield from _symbols_in_c(self.name)
            return
        source = _source(self.path)
        if source is None:
            return
        yield _Symbol("", "module", "", source.doc)
        yield from source.symbols
        for lender, exports in _borrowings(source, self):
            yield from _exported(lender, exports, 0)

    def _document(self, symbol: _Symbol) -> Document:
        title = f"{self.name}.{symbol.qualname}".rstrip(".")
        return Document(
            name=f"{PACKAGE_PREFIX}{self.of}#{title}",
            title=title,
            text=clean(f"{title}{symbol.signature}\n\n{symbol.doc}"),
            kind="docstring",
            metadata={"kind": "docstring", "module": self.name, "qualname": symbol.qualname, "symbol": symbol.kind},
        )


@dataclass(frozen=True)
class _Symbol:
    """A thing with a docstring. kind: "module", "class", "function", "method" or "property"."""

    qualname: str
    kind: str
    signature: str
    doc: str


def find_modules(name: str) -> list[Module]:
    """The public modules of a package (or the module) of that dotted name, in order; none of them is imported.

    Raises UsageError for what is no name, UnknownName for what is not installed.
    """
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(
            f"{PACKAGE_PREFIX}{name} names no package", remedy="write package:json or package:numpy.linalg"
        )
    found = _find(name)
    if found is None:
        known = {module.name for module in pkgutil.iter_modules()} | sys.stdlib_module_names
        raise UnknownName("package", name, [other for other in known if not other.startswith("_")])
    modules = [Module(name, found.source, name)] if found.source or found.is_c else []
    for folder in found.folders:
        modules += _walk(name, folder, name)
    if not modules:
        raise UsageError(
            f"the package {name!r} has no source to read docstrings from",
            remedy="only packages written in Python, and the standard library, can be read",
        )
    return modules


@dataclass(frozen=True)
class _Found:
    source: Path | None
    folders: Sequence[str] = ()
    is_c: bool = False


def _find(name: str) -> _Found | None:
    """Where a module is. importlib.util.find_spec would import the packages above it."""
    folders: list[str] | None = None
    found: _Found | None = None
    parts = name.split(".")
    for depth, part in enumerate(parts, 1):
        if depth > 1 and not folders:
            return None
        spec = _spec(".".join(parts[:depth]), part, folders)
        if spec is None:
            return None
        origin = spec.origin or ""
        source = Path(origin) if origin.endswith(".py") and os.path.isfile(origin) else None
        in_c = source is None and parts[0] in sys.stdlib_module_names and not spec.submodule_search_locations
        folders = [str(folder) for folder in spec.submodule_search_locations or ()]
        found = _Found(source, folders, in_c)
    return found


def _spec(full: str, part: str, folders: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    # The path first: the interpreter's own finders know frozen modules of the standard library, but not their source.
    finders: list[Any] = [importlib.machinery.PathFinder, *sys.meta_path]
    for finder in finders:
        try:
            spec = finder.find_spec(full, folders)
        except (ImportError, AttributeError, KeyError, ValueError, TypeError):
            continue  # some finders expect their package to be imported
        if isinstance(spec, importlib.machinery.ModuleSpec):
            return spec
    return None


def _walk(package: str, folder: str, of: str) -> Iterator[Module]:
    """The public modules in a package's folder, and in the packages within it; no tests, no links to folders."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name, extension = os.path.splitext(entry.name)
        if name.startswith("_") or not name.isidentifier() or name == "tests":
            continue
        if entry.is_file() and extension == ".py":
            yield Module(f"{package}.{name}", Path(entry.path), of)
        elif entry.is_dir(follow_symlinks=False) and not extension:
            initial = Path(entry.path, "__init__.py")
            if initial.is_file():
                yield Module(f"{package}.{name}", initial, of)
                yield from _walk(f"{package}.{name}", entry.path, of)


# --- what a source says ---


@dataclass(frozen=True)
class _Import:
    """A statement `from .module import name as other`: the dots, the module, (name, other) of each."""

    level: int
    module: str
    names: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Source:
    doc: str
    symbols: tuple[_Symbol, ...]
    imports: tuple[_Import, ...]


def _source(path: Path | None) -> _Source | None:
    """What a module's source says; None for one in C, and for one that cannot be read: it does not cost the package."""
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return _parsed(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)  # a private module may lend to many
def _parsed(path: Path, changed: int, size: int) -> _Source | None:
    try:
        tree = parse_python(decode(read_bytes(path), str(path)))
    except CratonError:
        return None
    if tree is None:
        return None
    imports = [
        _Import(node.level, node.module or "", tuple((alias.name, alias.asname or alias.name) for alias in node.names))
        for node in statements(tree.body)
        if isinstance(node, ast.ImportFrom)
    ]
    return _Source(ast.get_docstring(tree) or "", tuple(_symbols(tree.body, "")), tuple(imports))


# --- symbols of source ---


def _symbols(body: list[ast.stmt], prefix: str) -> Iterator[_Symbol]:
    for node in statements(body):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield from _of_definition(node, prefix)


def _of_definition(node: Definition, prefix: str) -> Iterator[_Symbol]:
    qualname = f"{prefix}{node.name}"
    doc = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        yield _Symbol(qualname, "class", _constructor(node), doc)
        if qualname.count(".") < _MAX_DEPTH:
            yield from _symbols(node.body, f"{qualname}.")
        return
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        yield _Symbol(qualname, "property", "", doc)
    else:
        bound = bool(prefix) and "staticmethod" not in decorators
        yield _Symbol(qualname, "method" if prefix else "function", _signature(node, bound), doc)


def _constructor(node: ast.ClassDef) -> str:
    for inner in statements(node.body):
        if isinstance(inner, ast.FunctionDef) and inner.name in ("__init__", "__new__"):
            return _signature(inner, bound=True, returns=False)
    return ""


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool, returns: bool = True) -> str:
    """The arguments as they stand in the source. bound: without the first, which is self or cls."""
    arguments = node.args
    if bound and (arguments.posonlyargs or arguments.args):
        arguments = ast.arguments(
            posonlyargs=arguments.posonlyargs[1:],
            args=arguments.args if arguments.posonlyargs else arguments.args[1:],
            vararg=arguments.vararg,
            kwonlyargs=arguments.kwonlyargs,
            kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg,
            defaults=arguments.defaults,
        )
        if len(arguments.defaults) > len(arguments.posonlyargs) + len(arguments.args):
            arguments.defaults = arguments.defaults[1:]  # self itself had a default
    result = f" -> {ast.unparse(node.returns)}" if returns and node.returns is not None else ""
    return f"({ast.unparse(arguments)}){result}"


# --- what a module takes from private modules and shows as its own ---

_Exports = dict[str, str] | None  # public name by the name there; None for all


def _borrowings(source: _Source, module: Module) -> Iterator[tuple[Module, _Exports]]:
    """The modules that lend this one public names: private ones of the same package, and C of the standard library."""
    top = module.name.partition(".")[0]
    is_standard = top in sys.stdlib_module_names
    for statement in source.imports:
        lender = _absolute(statement, module)
        last = lender.rpartition(".")[2]
        is_own = lender.partition(".")[0] == top and _is_private(lender)
        if not is_own and not (is_standard and (last.startswith("_") or last in sys.builtin_module_names)):
            continue
        public = {there: here for there, here in statement.names if not here.startswith("_")}
        exports: _Exports = None if "*" in public else public
        found = _find(lender) if exports is None or exports else None
        if found is not None and (found.source or found.is_c):
            yield Module(lender, found.source, module.of), exports


def _exported(module: Module, exports: _Exports, depth: int) -> Iterator[_Symbol]:
    """The symbols of a lender under the names that they get; with those that it has itself borrowed."""
    source = _source(module.path)
    if source is not None:
        symbols: Iterable[_Symbol] = source.symbols
    else:
        symbols = _symbols_in_c(module.name) if module.path is None else ()
    for symbol in symbols:
        first, dot, rest = symbol.qualname.partition(".")
        if symbol.kind != "module" and (exports is None or first in exports):
            qualname = (first if exports is None else exports[first]) + dot + rest
            yield _Symbol(qualname, symbol.kind, symbol.signature, symbol.doc)
    if source is None or depth == _MAX_DEPTH:
        return
    for lender, lent in _borrowings(source, module):
        passed = lent
        if exports is not None:  # only what is passed on, under the name that it has in the end
            names = {name: name for name in exports} if lent is None else lent
            passed = {there: exports[here] for there, here in names.items() if here in exports}
        if passed is None or passed:
            yield from _exported(lender, passed, depth + 1)


def _absolute(statement: _Import, module: Module) -> str:
    if not statement.level:
        return statement.module
    is_package = module.path is not None and module.path.name == "__init__.py"
    parts = module.name.split(".")
    base = parts[: len(parts) - statement.level + is_package]
    return ".".join([*base, statement.module] if statement.module else base)


def _is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


# --- modules in C ---


def _symbols_in_c(name: str) -> Iterator[_Symbol]:
    if name.partition(".")[0] not in sys.stdlib_module_names:
        return
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    yield _Symbol("", "module", "", inspect.getdoc(module) or "")
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or not callable(value):
            continue
        if isinstance(value, type):
            if value.__module__ not in (name, name.lstrip("_"), "builtins") and not name.startswith("_"):
                continue
            yield _Symbol(key, "class", _asked(value), _own_doc(value))
            for inner, member in sorted(vars(value).items()):
                if not inner.startswith("_"):
                    is_method = callable(member) or isinstance(member, (classmethod, staticmethod))
                    signature = _asked(getattr(value, inner, None)) if is_method else ""
                    kind = "method" if is_method else "property"
                    yield _Symbol(f"{key}.{inner}", kind, signature, _own_doc(member))
        else:
            yield _Symbol(key, "function", _asked(value), inspect.getdoc(value) or "")


def _own_doc(value: Any) -> str:
    """The docstring of a thing, not of its type."""
    doc = inspect.getdoc(value) or ""
    return "" if doc == (inspect.getdoc(type(value)) or "") and not isinstance(value, type) else doc


def _asked(value: Any) -> str:
    """The signature that a thing in C gives, if it gives one."""
    if isinstance(value, (types.ModuleType, type(None))):
        return ""
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        return ""
    return signature.replace("($self, /, ", "(").replace("(self, /, ", "(").replace("(self, /)", "()")
