"""Prompt files: read, refused, filled in, and written so that they are read again as they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.config import parse
from craton.errors import FileFormatError, UsageError
from craton.prompting.prompt import AnswerSettings, ExampleSettings, Prompt, prompt_toml, read_prompt


def test_a_markdown_prompt_is_front_matter_and_template(tmp_path):
    path = tmp_path / "p.md"
    path.write_text('+++\nsystem = "Sort."\n[examples]\ncount = 4\nchoose = "similar"\n+++\n\nText: {{ input }}\n')
    prompt = read_prompt(path)
    assert prompt.template == "Text: {{ input }}"
    assert prompt.examples == ExampleSettings(count=4, choose="similar")
    assert prompt.variables == {"input"}
    (tmp_path / "bare.md").write_text("{{ input }}!")
    assert read_prompt(tmp_path / "bare.md").messages({"input": "x"}) == [{"role": "user", "content": "x!"}]


texts = st.text(st.characters(codec="utf-8", exclude_characters="{}\r"), max_size=30)


@given(system=texts, stop=st.lists(texts.filter(bool), max_size=3), count=st.integers(0, 9))
def test_what_is_written_is_read_again(tmp_path_factory, system, stop, count):
    answer = AnswerSettings(
        stop=tuple(stop), json_schema={"type": "object", "properties": {"a b": {"type": "integer"}}}
    )
    prompt = Prompt(system=system, examples=ExampleSettings(count=count), answer=answer, samples=3)
    path = tmp_path_factory.mktemp("prompts") / "p.toml"
    path.write_text(prompt_toml(prompt), encoding="utf-8")
    assert read_prompt(path) == prompt
    assert read_prompt(path).digest == prompt.digest


@pytest.mark.parametrize(
    ("name", "text", "error", "says"),
    [
        ("p.toml", "template = '{{ input'", UsageError, "template"),
        ("p.toml", "templat = 'x'", UsageError, "did you mean 'template'"),
        ("p.toml", "[answer]\nregex = 'a'\nchoices = ['b']", UsageError, "one form"),
        ("p.toml", "samples = 3\n[answer]\nscoring = 'likelihood'", UsageError, "drawn"),
        ("p.toml", "a = [", FileFormatError, "TOML"),
        ("p.md", "+++\na = [\n+++\nx", FileFormatError, "TOML"),
        ("p.md", '+++\ntemplate = "x"\n+++\nx', UsageError, "body"),
        ("p.txt", "x", UsageError, ".toml or .md"),
    ],
)
def test_what_is_no_prompt_is_refused_in_words(tmp_path, name, text, error, says):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(error) as caught:
        read_prompt(path)
    assert says in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_variable_and_a_template_that_leaves_its_sandbox_are_errors():
    with pytest.raises(UsageError, match=r"nam.*undefined"):
        Prompt(template="{{ nam }}").messages({"input": "x"})
    with pytest.raises(UsageError):
        Prompt(template="{{ input.__class__.__mro__ }}").messages({"input": "x"})
    with pytest.raises(UsageError):
        parse(Prompt, {"template": "{{ x"}, where="here")


def test_examples_are_earlier_turns_and_passages_are_numbered():
    prompt = Prompt(system="S {{ choices | join('/') }}", template="{{ context }} {{ input }}")
    messages = prompt.messages(
        {"input": "q", "passages": ["a", "b"], "choices": ("y", "n")}, [({"input": "e", "choices": ()}, "A")]
    )
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == "S y/n"
    assert messages[-1]["content"] == "[1] a\n\n[2] b q"
