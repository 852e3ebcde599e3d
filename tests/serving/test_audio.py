"""`/v1/audio/transcriptions` and `/v1/audio/translations` with OpenAI's own client, and forms that are none."""

from __future__ import annotations

import io
import json
import threading

import numpy as np
import openai
import pytest

soundfile = pytest.importorskip("soundfile", reason="sound needs the extra [audio]")
pytest.importorskip("soxr", reason="sound needs the extra [audio]")

TEXT = "There is a temporary greeting which overrides your standard greetings."


@pytest.fixture(scope="module")
def hearing(serving, whisper_folder, tiny_model):
    """A server with Whisper tiny.en beside a tiny language model."""
    with serving(["whisper-tiny.en", tiny_model], max_upload_bytes=2_000_000) as running:
        yield running


@pytest.fixture(scope="module")
def ears(hearing):
    return openai.OpenAI(base_url=f"{hearing.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def speech(spoken_prompts) -> bytes:
    return next(path for path, _ in spoken_prompts if path.stem == "vm-tmpexists").read_bytes()


def tone(seconds: float = 1.0, rate: int = 16_000) -> bytes:
    wave = 0.3 * np.sin(np.arange(int(seconds * rate)) * 0.1)
    written = io.BytesIO()
    soundfile.write(written, wave, rate, format="WAV")
    return written.getvalue()


def ask(ears, sound: bytes, **fields):
    return ears.audio.transcriptions.create(file=("a.wav", sound), **{"model": "whisper-tiny.en", **fields})


class TestSpeech:
    def test_text(self, ears, speech):
        said = ask(ears, speech)
        assert said.text == TEXT
        assert (said.usage.type, said.usage.seconds) == ("duration", 5)
        assert ask(ears, speech, response_format="text").strip() == TEXT
        assert ask(ears, speech, language="en", prompt="Greetings.", temperature=0.0).text.startswith("There is a")

    def test_times(self, ears, speech):
        said = ask(ears, speech, response_format="verbose_json", timestamp_granularities=["word", "segment"])
        assert said.text == TEXT
        assert said.duration == pytest.approx(4.6, abs=0.5)
        assert [word.word.strip() for word in said.words][:3] == ["There", "is", "a"]
        assert said.segments[0].end <= said.duration + 0.1
        assert "-->" in ask(ears, speech, response_format="srt")
        assert ask(ears, speech, response_format="vtt").startswith("WEBVTT")

    def test_a_stream(self, ears, speech):
        events = list(ask(ears, speech, stream=True))
        assert events[-1].type == "transcript.text.done"
        assert events[-1].text == TEXT
        assert "".join(e.delta for e in events if e.type == "transcript.text.delta").strip() == TEXT

    def test_others_are_answered_meanwhile(self, hearing, ears, tiny_model):
        # Noise that lasts: several windows, and between them the other model writes.
        sound = np.random.default_rng(0).standard_normal(16_000 * 55) * 0.2
        written = io.BytesIO()
        soundfile.write(written, sound, 16_000, format="FLAC")
        done = []
        thread = threading.Thread(target=lambda: done.append(ask(ears, written.getvalue(), temperature=0.2)))
        thread.start()
        said = ears.completions.create(model=tiny_model.name, prompt="the code", max_tokens=4)
        assert said.choices[0].text is not None
        thread.join(120)
        assert len(done) == 1
        assert hearing.settled(5)

    def test_a_client_that_leaves_stops_the_work(self, hearing, ears, speech):
        stream = ask(ears, speech, stream=True)
        stream.close()
        assert hearing.settled(20)


class TestRefusals:
    def test_what_does_not_hear(self, ears, tiny_model):
        with pytest.raises(openai.BadRequestError, match="hears nothing"):
            ask(ears, tone(), model=tiny_model.name)
        with pytest.raises(openai.NotFoundError, match="no model"):
            ask(ears, tone(), model="other")
        with pytest.raises(openai.BadRequestError, match="audio/transcriptions"):
            ears.chat.completions.create(model="whisper-tiny.en", messages=[{"role": "user", "content": "Hi"}])

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"language": "fa"}, "English alone"),
            ({"temperature": 3}, "temperature"),
            ({"response_format": "mp3"}, "response_format"),
            ({"timestamp_granularities": ["word"]}, "verbose_json"),
            ({"extra_body": {"colour": "red"}}, "not supported"),
        ],
    )
    def test_fields(self, ears, fields, match):
        with pytest.raises(openai.BadRequestError, match=match):
            ask(ears, tone(), **fields)

    @pytest.mark.parametrize("sound", [b"no sound", b"RIFF" + bytes(40), tone()[:-500]])
    def test_what_is_no_sound(self, ears, sound):
        with pytest.raises(openai.APIStatusError) as refusal:
            ask(ears, sound)
        assert refusal.value.status_code == 400

    def test_english_models_do_not_translate(self, ears):
        with pytest.raises(openai.BadRequestError, match="English alone"):
            ears.audio.translations.create(file=("a.wav", tone()), model="whisper-tiny.en")

    def test_too_large(self, hearing):
        answer = hearing.http.post("/v1/audio/transcriptions", files={"file": bytes(3_000_000)}, data={"model": "x"})
        assert answer.status_code == 413

    def test_pages_of_other_sites(self, hearing):
        fields = {"files": {"file": b"x"}, "data": {"model": "whisper-tiny.en"}}
        answer = hearing.http.post("/v1/audio/transcriptions", **fields, headers={"origin": "https://example.org"})
        assert answer.status_code == 403
        own = hearing.http.post("/v1/audio/transcriptions", **fields, headers={"origin": hearing.url})
        assert own.status_code == 400  # its sound is none

    @pytest.mark.parametrize(
        ("kind", "body", "status"),
        [
            ("application/json", b"{}", 415),
            ("multipart/form-data", b"--x\r\n", 400),
            ("multipart/form-data; boundary=x", b"", 400),
            ("multipart/form-data; boundary=x", b"--x\r\nnonsense\r\n\r\n\r\n--x--\r\n", 400),
            ("multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data\r\n\r\n1\r\n--x--\r\n", 400),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\n' + b"m" * 100_000 + b"\r\n--x--\r\n",
                400,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n' * 100 + b"--x--\r\n",
                400,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n1\r\n' * 3 + b"--x--\r\n",
                400,
            ),
            ("multipart/form-data; boundary=x", b"--x\r\n" + b"h: " + b"v" * 100_000 + b"\r\n\r\n1\r\n--x--\r\n", 400),
        ],
    )
    def test_forms_that_are_none(self, hearing, kind, body, status):
        answer = hearing.http.post("/v1/audio/transcriptions", content=body, headers={"content-type": kind})
        assert answer.status_code == status
        assert "message" in json.loads(answer.text)["error"]
