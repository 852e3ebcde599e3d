"""Numbers of parameters as people write them."""

from __future__ import annotations

import pytest

from craton.config.sizes import parse_size
from craton.errors import UsageError


@pytest.mark.parametrize(("text", "size"), [("2m", 2_000_000), ("0.5M", 500_000), ("300 k", 300_000), ("64", 64)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "m", "-2m", "2mm"])
def test_no_sizes(text):
    with pytest.raises(UsageError):
        parse_size(text)
