"""Hostile templates: they get out of the sandbox nowhere, and none runs on or makes much out of little."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import TemplateError
from craton.modalities.text import ChatTemplate
from craton.modalities.text import template_limits as limits

MESSAGES = [{"role": "user", "content": "hello"}]


def rendered(source: str, messages: Any = MESSAGES, **options: Any) -> str:
    return ChatTemplate(source, {}).render_text(messages, **options)


def refused(source: str) -> TemplateError:
    with pytest.raises(TemplateError) as refusal:
        rendered(source)
    return refusal.value


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''['__cla' ~ 'ss__'].__mro__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ ['']|map(attribute='__class__')|list }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{0[__class__]}'.format('') }}",
        "{{ ('{0.__class__}'|attr('format'))('') }}",
        "{{ '%s'.__mod__(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% macro f() %}{% endmacro %}{{ f.__call__ }}",
        "{{ joiner.__subclasses__() }}",
        "{{ dict.__call__ }}",
        "{{ (5).to_bytes(2, 'big') }}",
        "{{ 'a'.encode() }}",
        "{{ lipsum() }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{% autoescape true %}<{% endautoescape %}",
    ],
)
def test_nothing_outside_is_reached(source: str) -> None:
    refused(source)


def grow(start: str, more: str, times: int = 60) -> str:
    """A template that makes ns.x from itself many times over."""
    change = more if "{%" in more else f"{{% set ns.x = {more} %}}"
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}{change}{{% endfor %}}"


LISTS, TUPLES = grow("[1]", "[ns.x, ns.x]"), grow("(1,)", "(ns.x, ns.x)")
TWINS = "{% set a = 'a' * 999999 %}{% set b = 'a' * 999999 %}"

ENDLESS = {
    "loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "loop conditions": "{% set r = range(99999) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "recursive loop": "{% for a in range(1000) recursive %}{{ loop(range(1000)) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "times": "{{ 'a' * 10**13 }}",
    "times a list": "{{ ([1] * 10**13)|length }}",
    "power": "{{ 10**100000 }}",
    "large numbers": grow("3", "ns.x * ns.x"),
    "plus": grow("'aaaa'", "ns.x + ns.x"),
    "concatenation": grow("'aaaa'", "ns.x ~ ns.x"),
    "captures": grow("'aaaa'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "own words": "{% for i in range(99999) %}" + "x" * 60_000 + "{% endfor %}",
    "own words in a macro": "{% macro f() %}{% for i in range(99999) %}"
    + "x" * 60_000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "printed lists": LISTS + "{{ ns.x }}",
    "compared lists": LISTS + "{% set a = ns.x %}" + LISTS + "{{ a == ns.x }}",
    "tested lists": LISTS + "{% set a = ns.x %}" + LISTS + "{{ a is eq ns.x }}",
    "searched lists": LISTS + "{{ 5 in ns.x }}",
    "json of lists": LISTS + "{{ ns.x|tojson }}",
    "joined lists": LISTS + "{{ [ns.x]|join }}",
    "mapped lists": LISTS + "{{ [ns.x]|map('string')|list }}",
    "formatted lists": LISTS + "{{ '{}'.format(ns.x) }}",
    "percent lists": LISTS + "{{ '%s' % (ns.x,) }}",
    "filtered lists": LISTS + "{% filter upper %}{{ ns.x }}{% endfilter %}",
    "views": grow("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x.items() }}",
    "hashed needles": TUPLES + "{{ ns.x in {1: 1} }}",
    "hashed keys": TUPLES + "{{ {ns.x: 1} }}",
    "hashed subscripts": TUPLES + "{{ messages[ns.x] }}",
    "hashed arguments": TUPLES + "{{ messages[0].get(ns.x) }}",
    "unique": TUPLES + "{{ [ns.x]|unique|list }}",
    "sorted": LISTS + "{{ [ns.x, ns.x]|sort }}",
    "center": "{{ 'a'|center(10**13) }}",
    "ljust": "{{ 'a'.ljust(10**13) }}",
    "rjust by name": "{{ 'a'['rjust'](10**13) }}",
    "zfill": "{{ 'a'.zfill(10**13) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**13) }}",
    "expandtabs by keyword": "{{ '\t'.expandtabs(tabsize=10**13) }}",
    "indent": "{{ 'a\nb'|indent(10**13) }}",
    "printf": "{{ '%10000000000000d' % 1 }}",
    "printf star": "{{ '%*d' % (10**13, 1) }}",
    "printf mapping": "{{ '%(a)10000000000000d' % {'a': 1} }}",
    "format filter": "{{ '%10000000000000d'|format(1) }}",
    "format method": "{{ '{:10000000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 10**13) }}",
    "format_map": "{{ '{a:10000000000000}'.format_map({'a': 1}) }}",
    "replace": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join": "{{ range(90000)|join('a' * 1000000) }}",
    "join method": "{{ ('a' * 1000000).join('b' * 1000000) }}",
    "batch": "{{ [1]|batch(10**13, 0)|list }}",
    "slice": "{{ [1]|slice(10**13)|list }}",
    "round": "{{ 1.5|round(10**13, 'ceil') }}",
    "int": "{{ ('9' * 4000)|int }}",
    "json indent": "{{ [1]|tojson(indent=10**13) }}",
    "sum of lists": "{{ ([[1]] * 99999)|sum(start=[]) }}",
    "select": "{% for i in range(99999) %}{% set x = range(99999)|select('equalto', 5)|list %}{% endfor %}",
    "stacked iterators": grow("range(99999)", "ns.x|map('string')", times=99999) + "{{ ns.x|list }}",
    "slices": "{% set a = 'a' * 1000000 %}{% for i in range(99999) %}{% set x = a[1:] %}{% endfor %}",
    "comparisons": TWINS + "{% for i in range(99) %}{{ a == b }}{% endfor %}",
    "searches": "{% set a = 'a' * 1000000 %}{% for i in range(99999) %}{{ 'ab' in a }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_work_is_ended(name: str) -> None:
    # Before it is done: not by running out of memory or of digits.
    assert "fails on these messages" not in refused(ENDLESS[name]).what


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
        "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
        "{{ " + "not " * 15_000 + "1 }}",
        "{{ a" + ".b" * 20_000 + " }}",
        "{{ 1" + "+1" * 20_000 + " }}",
        "{{ 1" + "<1" * 20_000 + " }}",
        "{{ a" + "|d" * 20_000 + " }}",
        "{% for a in b %}" * 500 + "{% endfor %}" * 500,
        "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "{{ a|d }}" * 6000,
        "{{ " + "1" * 60_000 + " }}",
        "x" * 70_000,
    ],
)
def test_sources_that_are_too_deep_or_too_long(source: str) -> None:
    refused(source)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 1 +", "{% endfor %}", "{{ 'x }}", "{% generation %}", "{{ x|nofilter }}"]
)
def test_malformed_templates_say_where(source: str) -> None:
    refusal = refused("\n\n" + source)
    assert "malformed" in refusal.what
    assert "line 3" in str(refusal.where)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ range(10**12) }}",
        "{{ none.x.y }}",
        "{{ 'a' + 1 }}",
        "{{ [1]['a']['b'] }}",
        "{{ messages|tojson(indent={}) }}",
    ],
)
def test_failures_within_a_template(source: str) -> None:
    assert "fails on these messages" in refused(source).what


def test_what_a_template_says_when_it_refuses() -> None:
    assert "roles must alternate" in refused("{{ raise_exception('roles must alternate') }}").what


def test_the_allowance_grows_with_the_conversation() -> None:
    """Work that is proportional to the input is never refused, however long it is."""
    words = (
        "{% for word in message.content.split(' ') %}{{ word ~ '' if word in message else word | upper }}{% endfor %}"
    )
    long = [{"role": "user", "content": "ab " * 5000}] * 40
    assert rendered("{% for message in messages %}" + words + "{% endfor %}", long) == "AB" * 5000 * 40


def test_verdicts_do_not_depend_on_what_was_rendered_before() -> None:
    template = ChatTemplate("{% for i in range(90000) %}x{% endfor %}", {})
    assert [template.render_text(MESSAGES) for _ in range(3)] == ["x" * 90_000] * 3


def test_threads_have_allowances_of_their_own() -> None:
    template = ChatTemplate("{% for i in range(90000) %}x{% endfor %}", {})
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(template.render_text(MESSAGES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["x" * 90_000] * 4


VALUES = st.recursive(
    st.one_of(st.text(max_size=5), st.integers(), st.none(), st.booleans(), st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(value=VALUES)
def test_weight_bounds_what_is_printed(value: Any) -> None:
    with limits.rendering(None):
        # Each item is charged for more than the characters that Python prints around it.
        assert len(str(value)) <= 10 * limits.weight(value) + 25


def test_weight_counts_shared_parts_each_time_and_stops() -> None:
    value: Any = ["x"]
    for _ in range(100):
        value = [value, value]
    with limits.rendering(None):
        assert limits.weight(value) > limits.current().work_left
        assert limits.weight([["ab"], ["ab"]]) == 2 * limits.weight(["ab"]) + limits.weight([1, 2]) - 2 * limits.weight(
            1
        )


PIECES = st.sampled_from(
    [
        "{% for i in range(9) %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ messages }}", "{{ x|", "}}", "{%",
        "%}", "{% set ns = namespace(a=1) %}", "{% set ns.a = ns.a ~ ns.a %}", "{% macro f() %}", "{% endmacro %}",
        "{{ f() }}",
        "join", "|tojson", " * 99", "[", "]", "(", ")", "'", "loop.index", "{% break %}", "{% generation %}",
        "{% endgeneration %}", "{#", "#}", "-", " x ", "messages[0].content", "{{ ''.join(['a']) }}", "__class__", ".",
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(PIECES, max_size=14))
def test_no_template_escapes_the_error_tree(pieces: list[str]) -> None:
    with contextlib.suppress(TemplateError):
        rendered("".join(pieces))
