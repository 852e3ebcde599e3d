"""What craton_native.h calls a model: the same structures, for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

from craton.inference.native.library import Weight


class Projection(ctypes.Structure):
    """craton_projection; all zeros: there is no such product."""

    _fields_ = (("weight", Weight), ("bias", c_void_p))


class Norm(ctypes.Structure):
    """craton_norm; all zeros: there is no norm here."""

    _fields_ = (("scale", c_void_p), ("eps", c_float))


class Rotary(ctypes.Structure):
    """craton_rotary."""

    _fields_ = (("frequencies", c_void_p), ("dims", c_int32), ("interleaved", c_int32), ("factor", c_float))


class Layer(ctypes.Structure):
    """craton_layer."""

    _fields_ = (
        ("qkv", Projection * 3),
        *((name, Projection) for name in ("o", "gate", "up", "down")),
        ("attention_norms", Norm * 3),
        ("feedforward_norms", Norm * 3),
        ("q_norm", Norm),
        ("k_norm", Norm),
        *((name, c_int32) for name in ("heads", "kv_heads", "head_size")),
        *((name, c_int32) for name in ("norm_over_width", "window", "rotary", "activation")),
        ("scale", c_float),
        ("softcap", c_float),
    )


class Model(ctypes.Structure):
    """craton_model."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("rotaries", POINTER(Rotary)),
        ("layer_count", c_int32),
        ("rotary_count", c_int32),
        ("embedding", Weight),
        ("embedding_table", c_void_p),
        ("embedding_scale", c_float),
        ("final_norm", Norm),
        ("head", Projection),
        ("logit_softcap", c_float),
        ("parts", c_int32),
    )


class Cache(ctypes.Structure):
    """craton_cache."""

    _fields_ = (
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("slots", c_int64),
        ("capacity", c_int64),
        ("layers", c_int32),
        ("type", c_int32),
    )


class StepRows(ctypes.Structure):
    """craton_step_rows."""

    _fields_ = (
        *((name, c_void_p) for name in ("ids", "positions", "slots")),
        ("count", c_int64),
        ("logits", c_int64),
        ("parts", c_int32),
    )
