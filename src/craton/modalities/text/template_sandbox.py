"""Jinja as chat templates need it: Hugging Face's dialect, in a sandbox, with every bit of work charged.

The environment is set up as in transformers (trimmed blocks, loop controls, `{% generation %}` blocks). Before a
template is compiled its syntax tree is rewritten, so that what Jinja would do on its own (passing through loops,
joining, comparing, printing) is charged to the allowance in `template_limits`.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from craton.errors import CratonError, TemplateError
from craton.modalities.text import template_limits as limits
from craton.modalities.text.template_filters import (
    check_method,
    concat,
    template_filters,
    template_globals,
    template_tests,
)

# The longest published templates have about 20 000 characters, and a few thousand nodes in their syntax trees.
_SOURCE_LIMIT = 64 * 1024
_NODE_LIMIT = 10_000

# Filters that only the rewritten tree uses; a template cannot spell a name with a colon.
_STEP, _CONCAT, _SIZE, _HAYSTACK, _WEIGHT = "charge:step", "charge:concat", "charge:size", "charge:in", "charge:weight"


@dataclass(frozen=True)
class CompiledTemplate:
    """template: ready to render within `template_limits.rendering`. marks_turns: whether it has generation blocks.

    takes_parts: whether it loops over the parts of a message's content (rather than expecting text).
    """

    template: jinja2.Template
    marks_turns: bool
    takes_parts: bool


@lru_cache(maxsize=64)
def compile_template(source: str) -> CompiledTemplate:
    """Compiles a chat template; TemplateError if it is malformed, too long or nested too deeply."""
    if len(source) > _SOURCE_LIMIT:
        raise TemplateError(
            f"the chat template has {len(source)} characters; at most {_SOURCE_LIMIT} are accepted",
            where="chat template",
        )
    environment = _environment()
    try:
        tree = environment.parse(source)
        parts = list(islice(tree.find_all(nodes.Node), _NODE_LIMIT + 1))
        if len(parts) > _NODE_LIMIT:
            raise TemplateError("the chat template is far longer than any in use", where="chat template")
        marks_turns = any(isinstance(part, nodes.ExtensionAttribute) and part.name == "mark" for part in parts)
        takes_parts = any(isinstance(part, nodes.For) and _is_content(part.iter) for part in parts)
        metered = cast(nodes.Template, _Meter().visit(tree))
        metered.set_environment(environment)
        with limits.rendering(None):
            code = environment.compile(metered)
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    except CratonError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is malformed: {error.message}", where=f"chat template, line {error.lineno}"
        ) from error
    except (RecursionError, SyntaxError, MemoryError) as error:
        raise TemplateError("the chat template is nested too deeply", where="chat template") from error
    except Exception as error:  # foreign code: any error is the template's
        raise TemplateError(f"the chat template cannot be compiled: {error}", where="chat template") from error
    return CompiledTemplate(template, marks_turns, takes_parts)


def render_template(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Renders within an open allowance; whatever goes wrong in the template's code becomes a TemplateError."""
    try:
        return template.render(variables)
    except CratonError:
        raise
    except RecursionError as error:
        raise TemplateError("the chat template or the messages are nested too deeply", where="chat template") from error
    except Exception as error:  # foreign code: any error is the template's
        raise TemplateError(
            f"the chat template fails on these messages: {error or type(error).__name__}",
            where="chat template",
            remedy="check that each message has what the template reads (role, content, tool calls)",
        ) from error


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model says, as opposed to what it reads."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(lineno)

    def mark(self, caller: Macro) -> str:
        marks = limits.current().marks
        text: str = caller()
        return text if marks is None else f"{marks[0]}{text}{marks[1]}"


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        limits.enter_call()
        try:
            check_method(function, (*args, *kwargs.values()))
            result = super().call(context, function, *args, **kwargs)
        finally:
            limits.leave_call()
        limits.charge(limits.length(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits.charge(limits.STEP)
        if operator == "+":
            limits.charge(limits.length(left) + limits.length(right))
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                    limits.charge(len(sequence) * max(times, 0))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                limits.check_integer(1 << min(left.bit_length() * max(right, 0), 1 << 16))
        elif isinstance(left, str):
            limits.check_printf(left)
            limits.charge(len(left) + limits.weight(right) * left.count("%"))
        result = super().call_binop(context, operator, left, right)
        limits.check_integer(result)
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            limits.charge(limits.weight(argument))  # hashing it visits all of its parts
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise TemplateError(
            f"the chat template reaches for {attribute!r} of a {type(obj).__name__}, which the sandbox forbids",
            where="chat template",
            remedy="do not use a model whose template does this",
        )

    def wrap_str_format(self, value: Any) -> Any:
        safe_format = super().wrap_str_format(value)
        if safe_format is None:
            return None
        text = str(value.__self__)

        def bounded_format(*args: Any, **kwargs: Any) -> str:
            for _, _, spec, _ in string.Formatter().parse(text):
                limits.check_format_spec(spec or "")
            limits.charge(len(text) + (limits.weight(args) + limits.weight(kwargs)) * text.count("{"))
            return safe_format(*args, **kwargs)

        return bounded_format


@jinja2.pass_context
def _print(context: Context, value: Any) -> Any:
    """Every piece of output passes here."""
    limits.charge(limits.STEP // 4 + limits.weight(value))
    return value


@lru_cache(maxsize=1)
def _environment() -> _ChatEnvironment:
    environment = _ChatEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, loopcontrols],
        finalize=_print,
        optimized=False,  # nothing is computed while compiling
    )
    environment.filters = cast(Any, template_filters()) | {
        _STEP: lambda _: limits.step(),
        _CONCAT: concat,
        _SIZE: lambda value: _paid(value, limits.length(value)),
        _WEIGHT: lambda value: _paid(value, limits.weight(value)),
        _HAYSTACK: lambda value: _paid(value, 1 if isinstance(value, dict) else limits.weight(value)),
    }
    environment.tests = cast(Any, template_tests())
    del environment.globals["lipsum"]
    environment.globals |= template_globals()
    return environment


def _paid(value: Any, cost: int) -> Any:
    limits.charge(cost)
    return value


class _Meter(NodeTransformer):
    """Rewrites a template so that it pays for its own work."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        match node:
            case nodes.For():
                node.body.insert(0, nodes.ExprStmt(self._step(node), lineno=node.lineno))
                if node.test is not None:
                    node.test = nodes.And(self._step(node), node.test, lineno=node.lineno)
            case nodes.TemplateData():
                # As constants, the template's own words pass through `_print` like all else.
                return nodes.Const(node.data, lineno=node.lineno)
            case nodes.Concat():
                return self._filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)
            case nodes.Compare():
                node.expr = self._filter(node.expr, _WEIGHT)
                for operand in node.ops:
                    operand.expr = self._filter(operand.expr, _HAYSTACK if operand.op in ("in", "notin") else _WEIGHT)
            case nodes.Getitem(arg=nodes.Slice()):
                node.node = self._filter(node.node, _SIZE)
            case nodes.Pair():
                node.key = self._filter(node.key, _WEIGHT)
            case nodes.ScopedEvalContextModifier():
                raise TemplateError("chat templates are plain text, without autoescape", where="chat template")
        return node

    def _step(self, node: nodes.Node) -> nodes.Filter:
        return self._filter(nodes.Const(None, lineno=node.lineno), _STEP)

    def _filter(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _is_content(node: nodes.Node) -> bool:
    """Whether an expression is a message's content, perhaps filtered: message.content, message['content'], content."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    match node:
        case nodes.Getattr(attr="content") | nodes.Name(name="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
    return False
