import numpy as np
import pytest

from craton.checkpoints.gguf import TypedValue, ValueType, boolean, f32, i8, string, u8, u32, u64
from craton.checkpoints.gguf.metadata import as_typed
from craton.errors import UsageError


def test_a_value_has_the_width_that_its_name_says() -> None:
    assert u32(7) == TypedValue(ValueType.U32, 7)
    assert u64([1, 2**64 - 1]) == TypedValue(ValueType.U64, [1, 2**64 - 1])
    assert u8(range(3)) == TypedValue(ValueType.U8, [0, 1, 2])
    assert boolean([True, False]) == TypedValue(ValueType.BOOL, [True, False])
    assert string([]) == TypedValue(ValueType.STRING, [])
    assert u32(np.int64(5)) == TypedValue(ValueType.U32, 5)


def test_a_float_is_what_a_reader_will_see() -> None:
    assert f32(0.1).value == float(np.float32(0.1))


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (u8, 256),
        (u8, -1),
        (i8, 128),
        (u32, 1.5),
        (u32, "7"),
        (f32, 1e300),
        (u64, [1, 2**64]),
        (boolean, 1),
        (string, [1]),
    ],
)
def test_what_does_not_fit_is_refused(make, value) -> None:
    with pytest.raises(UsageError, match=r"does not fit|is not a"):
        make(value)


def test_only_what_is_certain_is_guessed() -> None:
    assert as_typed("k", True) == boolean(True)
    assert as_typed("k", "text") == string("text")
    assert as_typed("k", ["a", "b"]) == string(["a", "b"])
    assert as_typed("k", u32(1)) == u32(1)


@pytest.mark.parametrize("value", [7, 0.5, [], [1, 2], [True], None])
def test_a_number_without_a_width_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="says nothing of its type") as caught:
        as_typed("llama.block_count", value)
    assert caught.value.where == "key 'llama.block_count'"
    assert "u32(7)" in str(caught.value.remedy)
