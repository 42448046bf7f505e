"""The structures that cross into C++, field by field as in decoder.cpp; pointers are plain addresses."""

import ctypes

_Address = ctypes.c_void_p
_Count = ctypes.c_int64


class Linear(ctypes.Structure):
    """A packed matrix; see linear.h."""

    _fields_ = [("panels", _Address), ("bias", _Address), ("outputs", _Count), ("inputs", _Count)]


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = [
        ("norm_before_attention", _Address),
        ("norm_before_mlp", _Address),
        ("query_norm", _Address),
        ("key_norm", _Address),
        ("query", Linear),
        ("key", Linear),
        ("value", Linear),
        ("output", Linear),
        ("gate", Linear),
        ("up", Linear),
        ("down", Linear),
        ("window", _Count),
        ("scaling", ctypes.c_float),
    ]


class Decoder(ctypes.Structure):
    """A whole model."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("layer_count", _Count),
        ("hidden", _Count),
        ("heads", _Count),
        ("epsilon", ctypes.c_float),
        ("final_norm", _Address),
        ("embedding", _Address),
        ("head", Linear),
    ]


class Pool(ctypes.Structure):
    """Where the KV pool lies; strides in floats."""

    _fields_ = [
        ("data", _Address),
        ("block_stride", _Count),
        ("page", _Count),
        ("block_tokens", _Count),
        ("kv_heads", _Count),
        ("head_dim", _Count),
    ]


class Step(ctypes.Structure):
    """One step's inputs, outputs and memory."""

    _fields_ = [
        ("tokens", _Count),
        ("ids", _Address),
        ("positions", _Address),
        ("cosines", _Address),
        ("sines", _Address),
        ("rows", _Count),
        ("counts", _Address),
        ("lengths", _Address),
        ("tables", _Address),
        ("kept_count", _Count),
        ("kept", _Address),
        ("logits", _Address),
        ("workspace", _Address),
        ("threads", _Count),
    ]


class Draw(ctypes.Structure):
    """Logits, one value a row of each parameter, and where the tokens go."""

    _fields_ = [
        ("rows", _Count),
        ("vocab", _Count),
        ("logits", _Address),
        ("temperature", _Address),
        ("top_k", _Address),
        ("top_p", _Address),
        ("min_p", _Address),
        ("uniform", _Address),
        ("tokens", _Address),
        ("threads", _Count),
    ]
