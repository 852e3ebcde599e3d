"""One turn of one recogniser in a process of its own: loads its model, warms up, transcribes files, prints the figures.

Standalone, so that a peer may live in an environment of its own: `python transcribe_turn.py '{"contender": ...}'`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Transcribe = Callable[[list[str]], list[str]]


def craton(settings: dict[str, Any]) -> Transcribe:
    """Craton: all files through one call, whose batches hold windows of several."""
    import craton
    from craton.inference.transcription_settings import TranscriptionSettings
    from craton.modalities.audio import read_audio

    model = craton.load(settings["model"], threads=settings["threads"])
    asked = TranscriptionSettings(**settings["settings"])

    def transcribe(files: list[str]) -> list[str]:
        found = model.transcriber.transcribe((read_audio(file) for file in files), asked)
        return [transcript.text for transcript in found]

    return transcribe


def faster_whisper(settings: dict[str, Any]) -> Transcribe:
    """faster-whisper, file by file; a batch is its BatchedInferencePipeline's."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    threads, kind = settings["threads"], settings["compute_type"]
    model = WhisperModel(settings["model"], device="cpu", compute_type=kind, cpu_threads=threads)
    batch = settings.get("batch")
    pipeline = BatchedInferencePipeline(model) if batch else model
    more = {"batch_size": batch} if batch else {"condition_on_previous_text": False}

    def transcribe(files: list[str]) -> list[str]:
        texts = []
        for file in files:
            segments, _ = pipeline.transcribe(file, beam_size=1, word_timestamps=settings["words"], **more)
            texts.append("".join(segment.text for segment in segments).strip())
        return texts

    return transcribe


def main() -> None:
    """Print {"seconds", "cpu", "texts"}, or {"absent": why}."""
    settings = json.loads(sys.argv[1])
    try:
        transcribe = {"craton": craton, "faster_whisper": faster_whisper}[settings["contender"]](settings)
    except ImportError as error:
        print(json.dumps({"absent": f"{error.name} is not installed"}))
        return
    transcribe(settings["warm_up"])
    wall, cpu = time.perf_counter(), time.process_time()
    texts = transcribe(settings["files"])
    figures = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "texts": texts}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
