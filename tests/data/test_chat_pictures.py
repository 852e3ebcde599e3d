"""Conversations with pictures as training reads them: the prompts of inference, byte for byte, and what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="pictures need Pillow")

from tests.inference.test_pictures import photo, write_seeing

import craton
from craton.checkpoints.checkpoint import Checkpoint
from craton.data.batch import collate
from craton.data.chat_pictures import ChatPictures
from craton.data.example import UNTRAINED
from craton.data.inspection import inspect_records
from craton.data.lengths import LengthReport, LengthSettings, fit
from craton.data.records import Record, read_records
from craton.data.rendering import render_record
from craton.data.schema import check_schema
from craton.errors import CratonError, DataError
from craton.inference.model import Model
from craton.modalities.image import encode_png
from craton.models import ImageChatConfig

SIZES = {"a.png": (24, 24), "b.png": (50, 20), "c.png": (70, 66)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return craton.load(write_seeing(tmp_path_factory.mktemp("smolvlm")), threads=1)


@pytest.fixture(scope="module")
def pictures(model: Model) -> ChatPictures:
    return made(model)


def made(model: Model) -> ChatPictures:
    config = model.module.config
    assert isinstance(config, ImageChatConfig)
    return ChatPictures(config, model.tokenizer, model.checkpoint.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(encode_png(photo(seed, *size)))
    (folder / "text.png").write_text("no picture")
    return folder


def shown(*parts: str) -> dict[str, Any]:
    """A user's message; names of files are pictures."""
    content = [{"type": "image", "image": p} if p.endswith(".png") else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def record(folder: Path, *messages: dict[str, Any], **keys: Any) -> Record:
    return Record({"messages": list(messages), "tools": None, **keys}, f"{folder / 'chats.jsonl'}:7")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(
        st.tuples(
            st.lists(st.sampled_from([*SIZES, "What?", "سلام ", " \n"]), min_size=1, max_size=4),
            st.text("ab \n.", min_size=1, max_size=5).filter(str.strip),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_trained_follows_the_prompt_of_inference(
    model: Model, pictures: ChatPictures, folder: Path, turns: list[tuple[list[str], str]]
) -> None:
    messages: list[dict[str, Any]] = []
    for parts, answer in turns:
        messages += [shown(*parts), said(answer)]
    example = render_record(record(folder, *messages), model.tokenizer, "messages", pictures=pictures)
    (sequence,) = example.sequences
    ids = sequence.ids.tolist()
    asked = json.loads(json.dumps(messages))
    for message in asked:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = str(folder / part["image"])
    for turn in range(len(turns)):
        prompt = model.prompt(asked[: 2 * turn + 1])
        assert ids[: len(prompt.ids)] == prompt.ids
        # What is learnt begins where the prompt ends.
        assert sequence.targets[len(prompt.ids) - 1] == ids[len(prompt.ids)]
        if len(prompt.ids) > 1:
            assert sequence.targets[len(prompt.ids) - 2] == UNTRAINED
    seen = [picture.pixels_CHW for picture in prompt.pictures]
    mine = [tile for picture in example.pictures for tile in picture.read()]
    assert len(seen) == len(mine)
    assert all(np.array_equal(a, b) for a, b in zip(seen, mine, strict=True))
    assert [p.end for p in example.pictures][-1:] == [p.end for p in prompt.pictures][-1:]
    assert pictures.token not in sequence.targets


def test_prompt_and_answer_as_messages_are_the_same_conversation(
    model: Model, pictures: ChatPictures, folder: Path
) -> None:
    value = {"prompt": [shown("a.png", "What?")], "completion": [said("A.")]}
    pair = render_record(Record(value, f"{folder}/x.jsonl:1"), model.tokenizer, "prompt", pictures=pictures)
    whole = render_record(
        record(folder, shown("a.png", "What?"), said("A.")), model.tokenizer, "messages", pictures=pictures
    )
    assert pair.sequences[0].ids.tolist() == whole.sequences[0].ids.tolist()
    assert pair.sequences[0].targets.tolist() == whole.sequences[0].targets.tolist()
    assert len(pair.pictures) == 1


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([shown("missing.png"), said("A.")], "missing.png"),
        ([shown("text.png"), said("A.")], "not a picture"),
        ([shown("What is <image>?"), said("A.")], "1 places for 0 pictures"),
        ([shown("a.png", "<image>"), said("A.")], "2 places for 1 pictures"),
        ([{"role": "user", "content": [{"type": "image"}]}, said("A.")], "has no picture"),
        ([{"role": "user", "content": [{"type": "image", "image": 5}]}, said("A.")], "name of a file"),
        ([shown("Draw."), {"role": "assistant", "content": shown("a.png", "So.")["content"]}], "in an answer"),
    ],
)
def test_what_is_wrong_names_file_and_line(
    model: Model, pictures: ChatPictures, folder: Path, messages: list[dict[str, Any]], match: str
) -> None:
    with pytest.raises(CratonError, match=match) as caught:
        render_record(record(folder, *messages), model.tokenizer, "messages", pictures=pictures)
    assert f"{folder / 'chats.jsonl'}:7" in str(caught.value.where)


def test_a_model_that_does_not_see(model: Model, folder: Path) -> None:
    with pytest.raises(DataError, match="sees none") as caught:
        render_record(record(folder, shown("a.png"), said("A.")), model.tokenizer, "messages")
    assert "chats.jsonl:7" in str(caught.value.where)


def test_marks_in_other_texts_and_pictures_of_the_hub(model: Model, pictures: ChatPictures, folder: Path) -> None:
    value = {"prompt": "What is <image>?", "completion": "A."}
    with pytest.raises(DataError, match="stands for a picture"):
        render_record(Record(value, "a.jsonl:1"), model.tokenizer, "prompt", pictures=pictures)
    hub = Record({"messages": [shown("a.png"), said("A.")], "tools": None}, "hf:some/data#3")
    with pytest.raises(DataError, match="name of a file"):
        render_record(hub, model.tokenizer, "messages", pictures=pictures)


def test_a_picture_that_changes_under_a_run_is_noticed(model: Model, pictures: ChatPictures, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode_png(photo(1, 20, 20)))
    example = render_record(
        record(tmp_path, shown("x.png"), said("A.")), model.tokenizer, "messages", pictures=pictures
    )
    (tmp_path / "x.png").write_bytes(encode_png(photo(2, 20, 20)))
    with pytest.raises(DataError, match="not what it was"):
        collate([example]).pixels()


def test_packed_pictures_stand_in_the_order_of_their_tokens(model: Model, pictures: ChatPictures, folder: Path) -> None:
    examples = [
        render_record(record(folder, shown(*names, "?"), said("A.")), model.tokenizer, "messages", pictures=pictures)
        for names in (("a.png",), (), ("c.png", "b.png"))
    ]
    batch = collate(examples)
    tiles = sum(picture.tiles for picture in batch.pictures)
    assert int((batch.ids_T == pictures.token).sum()) == tiles * pictures.tokens
    assert len(batch.pixels()) == tiles
    assert batch.to("cpu").pictures == batch.pictures


def test_no_picture_is_cut(model: Model, pictures: ChatPictures, folder: Path) -> None:
    example = render_record(
        record(folder, said("A."), shown("a.png"), said("B.")), model.tokenizer, "messages", pictures=pictures
    )
    end, length = example.pictures[0].end, example.tokens
    for limit, kept in ((end - 1, 0), (end, 1), (length - 1, 1)):
        report = LengthReport()
        cut = list(fit(example, LengthSettings(max_tokens=limit, overlong="truncate"), (), report))
        assert (len(cut), report.dropped) == (kept, 1 - kept)


def test_inspection_shows_a_picture_as_one_mark(model: Model, pictures: ChatPictures, folder: Path) -> None:
    lines = [{"messages": [shown(name, "What?"), said("A.")]} for name in ("a.png", "b.png", "a.png")]
    (folder / "inspected.jsonl").write_text("\n".join(map(json.dumps, lines)))
    checked = check_schema(read_records(folder / "inspected.jsonl"))
    found = inspect_records(checked, tokenizer=model.tokenizer, pictures=pictures)
    tokens = found.samples[0].sequences["messages"]
    marks = [token for token in tokens if "<image>" in token.text]
    tiles = len(pictures.prepare(photo(0, *SIZES["a.png"])))
    assert [(t.text, t.trained, t.special) for t in marks] == [(f"<image> x {pictures.tokens}", False, True)] * tiles
    assert found.texts.duplicates == 1  # the other picture is another record
    blind = inspect_records(check_schema(read_records(folder / "inspected.jsonl")), tokenizer=model.tokenizer)
    assert blind.problem_count == 3


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    other = Checkpoint.open(write_seeing(tmp_path, "llava"))
    (tmp_path / "preprocessor_config.json").write_text(
        (tmp_path / "preprocessor_config.json").read_text().replace("24", "32")
    )
    with pytest.raises(CratonError, match="32 x 32"):
        made(craton.load(other.folder, threads=1))
