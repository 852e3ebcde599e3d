"""Tokenizers out of GGUF metadata, against transformers, against published rules and against a slow reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from craton.errors import CratonError, FileFormatError, UnknownName
from craton.modalities.text import Tokenizer, tokenizer_from_gguf
from craton.modalities.text.gguf_tokenizer import merges_from_scores
from craton.modalities.text.pretokenizers import PRE_TOKENIZERS

from .conftest import LINES, sentencepiece_metadata, sentencepiece_vocabulary, train_byte_level

FAST = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
