"""`/v1/completions`: continuation, batches, and exact log-probabilities of prompts."""

from __future__ import annotations

import openai
import pytest

import craton

TEXT = "the code of red is zim and the code of blue is zam"


@pytest.fixture(scope="module")
def model(tiny_model):
    return craton.load(str(tiny_model), threads=1)


def test_texts_ids_and_batches_are_continued(client, model_id, model):
    ids = model.tokenizer.encode(TEXT)
    expected = model.generate(ids, max_tokens=8).text
    common = {"model": model_id, "max_tokens": 8, "temperature": 0}
    assert client.completions.create(prompt=TEXT, **common).choices[0].text == expected
    assert client.completions.create(prompt=ids, **common).choices[0].text == expected
    several = client.completions.create(prompt=[TEXT, "red"], n=2, seed=1, **common | {"temperature": 1})
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    alone = client.completions.create(prompt="red", n=2, seed=1, **common | {"temperature": 1})
    assert [c.text for c in several.choices[2:]] == [c.text for c in alone.choices]
    assert several.usage.prompt_tokens == len(ids) + len(model.tokenizer.encode("red"))
    by_ids = client.completions.create(prompt=[ids, ids], **common)
    assert [choice.text for choice in by_ids.choices] == [expected, expected]


def test_a_stream_of_a_batch_says_the_same(client, model_id):
    common = {"model": model_id, "prompt": [TEXT, "blue"], "max_tokens": 8, "temperature": 1, "seed": 4}
    whole = client.completions.create(**common)
    texts = ["", ""]
    for chunk in client.completions.create(**common, stream=True, echo=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [TEXT + whole.choices[0].text, "blue" + whole.choices[1].text]


def test_echo_scores_a_prompt_as_the_model_does(client, model_id, model):
    ids = model.tokenizer.encode(TEXT * 9)
    assert len(ids) > 128, "more than one piece"
    [expected] = model.score([(ids[:1], ids[1:])])
    said = client.completions.create(model=model_id, prompt=ids, max_tokens=0, echo=True, logprobs=2)
    [choice] = said.choices
    assert choice.text == TEXT * 9
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected.token_logprobs, abs=1e-4)
    greedy = [
        max(top.values()) == logprob
        for top, logprob in zip(choice.logprobs.top_logprobs[1:], choice.logprobs.token_logprobs[1:], strict=True)
    ]
    assert all(greedy) == expected.greedy
    offsets = choice.logprobs.text_offset
    assert [choice.text[a:b] for a, b in zip(offsets, [*offsets[1:], len(choice.text)], strict=True)] == (
        choice.logprobs.tokens
    )


def test_a_likeliest_continuation_is_known_as_one(client, model_id, model):
    ids = model.tokenizer.encode(TEXT)
    likely = [token.id for token in model.generate(ids, max_tokens=6).choices[0].tokens]
    said = client.completions.create(
        model=model_id, prompt=[*ids, *likely], max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    logprobs = said.choices[0].logprobs
    for top, logprob in zip(logprobs.top_logprobs[len(ids) : -1], logprobs.token_logprobs[len(ids) : -1], strict=True):
        assert max(top.values()) == logprob
    assert len(logprobs.tokens) == len(ids) + len(likely) + 1


def test_the_harness_scores_over_http_what_it_scores_in_process(server, model_id, tiny_model, model, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from craton.evaluation.harness import harness_model

    pairs = [("the code of red is", " zim"), ("the code of red is", " zam zum"), ("what text", " class answer blue")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    remote = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=model_id,
        tokenizer=str(tiny_model),
        tokenizer_backend="huggingface",
        max_length=500,
    )
    over_http = remote.loglikelihood(requests)
    in_process = harness_model(model).loglikelihood(requests)
    assert [greedy for _, greedy in over_http] == [greedy for _, greedy in in_process]
    assert [score for score, _ in over_http] == pytest.approx([score for score, _ in in_process], abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": [5, 10**6]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 300}, "prompt"),
        ({"logprobs": 10**9}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, model_id, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": model_id, "prompt": TEXT, **fields})
    assert caught.value.param.split(".")[0] == param
