"""The bridge to lm-evaluation-harness (Gao et al. 2024, doi:10.5281/zenodo.12608602): its tasks, our engine.

Texts become tokens, are cut and are scored as by its own Hugging Face backend, so that the figures can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from craton.errors import TemplateError, UnknownName, UsageError
from craton.inference.model import Model
from craton.inference.scoring import joined, rolling_windows
from craton.inference.settings import SamplingSettings
from craton.modalities.text import ChatTemplate

if TYPE_CHECKING:
    from lm_eval.api.model import LM

log = logging.getLogger(__name__)

# lm-eval's own default for tasks that do not say how long an answer may be.
MAX_ANSWER_TOKENS = 256
# For the standard errors of perplexities: 1000 give them to about 2%, the harness's 100,000 take too long.
BOOTSTRAP_ITERATIONS = 1000
# So many pairs are scored between two steps of the progress bar.
BATCH_PAIRS = 256
# The generation settings of a task that are followed; others that change the text are refused.
SAMPLING_NAMES = frozenset({"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"})
# Without influence on the text of one answer by the engine.
IGNORED_NAMES = frozenset({"until", "do_sample", "max_gen_toks", "use_cache", "pad_token_id", "num_return_sequences"})


class HarnessFigure(TypedDict):
    """A metric as the harness gives it. stderr: None where the harness has none. n: the items that it answered."""

    value: float
    stderr: float | None
    n: int


def run_harness(
    model: Model,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
) -> dict[str, dict[str, HarnessFigure]]:
    """Run tasks of lm-evaluation-harness: {task: {metric: figure}}.

    A metric behind a filter is named "metric,filter". limit: the first so many items of each task. num_fewshot: instead
    of the task's own number. include_path: a folder of tasks of your own.

    Raises UnknownName for a task that does not exist, UsageError if lm_eval is not installed, and whatever the
    harness raises where a data set cannot be had.
    """
    _need_harness()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    # Reading the thousands of tasks that the harness brings takes a while: only where the folder does not suffice.
    manager = TaskManager(include_path=path, include_defaults=path is None)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            raise UnknownName("task", task, known)
    found = simple_evaluate(
        model=harness_model(model),
        tasks=list(tasks),
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
    )
    assert found is not None, "only other processes than the first get nothing"
    return {task: _metrics(values) for task, values in found["results"].items()}


def harness_model(model: Model) -> LM:
    """The model as lm-evaluation-harness wants it, for its own `simple_evaluate`; see `run_harness`.

    Raises UsageError if lm_eval is not installed, or for a model with neither BOS nor EOS.
    """
    _need_harness()
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from tqdm import tqdm

    start = _start(model)

    class HarnessModel(TemplateLM):  # type: ignore[misc]
        """See `harness_model`."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.tokenizer = model, model.tokenizer
            self.max_length, self.max_gen_toks = model.context, MAX_ANSWER_TOKENS

        @property
        def eot_token_id(self) -> int:
            return next(iter(model.tokenizer.eos_ids), start)

        @property
        def prefix_token_id(self) -> int:
            return start

        @property
        def tokenizer_name(self) -> str:
            return model.name.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
            if add_special_tokens is None:  # a rendered conversation has its BOS already
                add_special_tokens = not string.startswith(self.tok_decode([start]))
            return model.tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def tok_decode(self, tokens: Sequence[int]) -> str:
            return model.tokenizer.decode(tokens, skip_special_tokens=False)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """A conversation as text; without the generation prompt, its last message is left open to go on."""
            return _conversation(model, chat_history, add_generation_prompt)

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            **ignored: Any,
        ) -> list[tuple[float, bool]]:
            pairs = [_fitting(model, context, continuation) for _, context, continuation in requests]
            # Contexts that begin alike one after another: what they share is read once.
            order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
            results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
            with tqdm(total=len(pairs), disable=disable_tqdm, desc="Scoring") as bar:
                for batch in _batches(order):
                    for i, score in zip(batch, model.scorer.score([pairs[i] for i in batch]), strict=True):
                        results[i] = (score.logprob, score.greedy)
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                    bar.update(len(batch))
            return results

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            results = []
            for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="Reading"):
                # As the harness does it: where the tokeniser puts a BOS first, that one is predicted too.
                windows = rolling_windows(self.tok_encode(text), self.max_length, start)
                results.append(joined(model.scorer.score(windows)).logprob)
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
            return results

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            prompts: list[tuple[list[int], SamplingSettings]] = []
            untils: list[list[str]] = []
            for number, request in enumerate(requests):
                context, given = request.args
                settings: dict[str, Any] = normalize_gen_kwargs(given, self.max_gen_toks)
                until = [stop for stop in settings["until"] or () if stop]
                prompts.append((self._prompt(context, settings["max_gen_toks"]), _sampling(settings, until, number)))
                untils.append(until)
            results = []
            answers = model.generate_many(prompts)
            for request, until, answer in zip(
                requests, untils, tqdm(answers, total=len(requests), disable=disable_tqdm, desc="Writing"), strict=True
            ):
                # The engine stops at the first few strings by itself; this cuts at all of them.
                results.append(postprocess_generated_text(answer.text, until, None))
                self.cache_hook.add_partial("generate_until", request.args, results[-1])
            return results

        def _prompt(self, context: str, answer_tokens: int) -> list[int]:
            room = self.max_length - answer_tokens
            if room < 1:
                raise UsageError(
                    f"the task asks for answers of {answer_tokens} tokens, and {model.name} has a context of "
                    f"{self.max_length}",
                    remedy="choose a model with a longer context",
                )
            ids = self.tok_encode(context)
            if len(ids) > room:
                log.warning("a prompt of %d tokens was cut to its last %d", len(ids), room)
            return ids[-room:]

    return HarnessModel()


def _start(model: Model) -> int:
    if model.start_id is None:
        raise UsageError(
            f"{model.name} has neither a BOS nor an EOS token, which the harness begins texts with",
            remedy="choose another model",
        )
    return model.start_id


def _fitting(model: Model, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
    # As the harness does it, and not silently: the beginning of a context that is too long is cut off.
    room = model.context + 1 - len(continuation)
    if room < 1:
        raise UsageError(
            f"an answer of {len(continuation)} tokens does not fit the context of {model.context}",
            remedy="choose a model with a longer context",
        )
    if len(context) > room:
        log.warning("a context of %d tokens was cut to its last %d", len(context), room)
    return context[-room:], continuation


def _sampling(settings: Mapping[str, Any], until: Sequence[str], number: int) -> SamplingSettings:
    fields: dict[str, Any] = {"max_tokens": settings["max_gen_toks"], "stop": tuple(until[:16])}
    unknown = set(settings) - SAMPLING_NAMES - IGNORED_NAMES
    if settings.get("num_beams") == 1:
        unknown.discard("num_beams")
    if unknown:
        raise UnknownName("generation setting of the task", min(unknown), SAMPLING_NAMES)
    if settings["do_sample"]:
        fields |= {name: settings[name] for name in SAMPLING_NAMES if settings.get(name) is not None}
        fields.setdefault("temperature", 1.0)
        fields.setdefault("seed", number)  # repeats of one item differ, repeats of the run do not
    elif settings.get("repetition_penalty") is not None:
        fields["repetition_penalty"] = settings["repetition_penalty"]
    return SamplingSettings.model_validate(fields)


def _conversation(model: Model, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    template = ChatTemplate.of(model.tokenizer)
    try:
        text = template.render_text(messages, add_generation_prompt=add_generation_prompt)
    except TemplateError:
        if all(message["role"] != "system" for message in messages):
            raise
        log.warning("the chat template refuses this conversation, so its system message is left out")
        messages = [message for message in messages if message["role"] != "system"]
        text = template.render_text(messages, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        return text
    said = messages[-1]["content"]
    said = said if said in text else said.strip()  # many templates trim
    return text[: text.rindex(said) + len(said)]


def _metrics(values: Mapping[str, Any]) -> dict[str, HarnessFigure]:
    """The harness's flat "metric,filter" and "metric_stderr,filter" as figures."""
    metrics: dict[str, HarnessFigure] = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else key
        stderr = float(error) if isinstance(error, int | float) else None
        metrics[name] = {"value": float(value), "stderr": stderr, "n": values["sample_len"]}
    return metrics


def _batches(order: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(order), BATCH_PAIRS):
        yield order[first : first + BATCH_PAIRS]


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError(
            "the tasks of lm-evaluation-harness need the package lm_eval, which is not installed",
            remedy="pip install 'craton[eval]'",
        ) from None
