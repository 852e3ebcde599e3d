"""Sound: files to samples, samples to a log-mel spectrogram, where somebody speaks, and the tokens of speech models.
Nothing here imports torch."""

from craton.modalities.audio.activity import Activity, find_speech
from craton.modalities.audio.files import SAMPLE_RATE, AudioLimits, check_samples, read_audio
from craton.modalities.audio.log_mel import FRAMES_PER_SECOND, HOP, log_mel
from craton.modalities.audio.speech_tokens import SpeechTokens

__all__ = [
    "FRAMES_PER_SECOND",
    "HOP",
    "SAMPLE_RATE",
    "Activity",
    "AudioLimits",
    "SpeechTokens",
    "check_samples",
    "find_speech",
    "log_mel",
    "read_audio",
]
