import pytest

from craton.checkpoints.gguf import GGMLType, ValueType
from craton.checkpoints.gguf.types import TYPE_OF_ID, UNSUPPORTED_TYPES


@pytest.mark.peer
def test_tensor_types_are_the_peers() -> None:
    gguf = pytest.importorskip("gguf")
    for type in set(GGMLType) - {GGMLType.Q8_1}:  # the peer still gives Q8_1 float32 scales; GGML has halves
        theirs = gguf.GGMLQuantizationType[type.name]
        assert (type.id, (type.block_size, type.block_bytes)) == (theirs.value, gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.peer
def test_every_type_of_the_peer_has_a_name() -> None:
    gguf = pytest.importorskip("gguf")
    for theirs in gguf.GGMLQuantizationType:
        ours = TYPE_OF_ID[theirs.value].name if theirs.value in TYPE_OF_ID else UNSUPPORTED_TYPES.get(theirs.value)
        assert ours == theirs.name


@pytest.mark.peer
def test_value_types_are_the_peers() -> None:
    gguf = pytest.importorskip("gguf")
    long_names = {"U": "UINT", "I": "INT", "F": "FLOAT"}
    for type in ValueType:
        name = type.name if type in (ValueType.BOOL, ValueType.STRING) else long_names[type.name[0]] + type.name[1:]
        assert gguf.GGUFValueType[name].value == type.id
