# SPDX-License-Identifier: Apache-2.0
"""The ``quarot`` operators: one definition each.

An operator is a NumPy reference (the truth), an ONNX function body (so that ONNX Runtime,
Polygraphy and Netron need nothing registered) and the list of its attributes. The TensorRT plugins
and the CUDA kernels have the same names and attributes and are compared with the reference.

Conventions, stated once:

* ``x`` is a row vector: a rotation by ``H`` is ``x @ H``. Tokens are all leading axes, features the
  last.
* Codes of ``bits`` bits are ``-2**(bits-1) .. 2**(bits-1)-1``; rounding is half to even; every
  scale is float32 and is 1 where the data is all zero.
* Portable storage, used in ``model.onnx``: activation codes are uint8 with zero point 128, one per
  byte; weight codes are INT4 (INT8 above 4 bits) initializers ``[in_features, out_features]``.
* The cache of up to 4 bits holds two codes 0..15 in one uint8, low nibble first, so its last axis
  is head_dim / 2: a 3-bit code takes 4 bits.
* Kernel storage of activations and weights is two's-complement nibbles, low nibble first:
  `pack_int4`.

A module for each kind of operator, with its references, its bodies and its part of the table:
`rotations`, `linear`, `groups`, `cache`, `attention`. `graph` puts them into a model.
"""

from quarot_onnx.ops.attention import (
    attention_sinks,
    kv_attention,
)
from quarot_onnx.ops.cache import (
    kv_append,
    kv_append_groups,
    kv_dequantize,
    kv_fake_quantize,
    pack_kv,
    quantize_kv,
    unpack_kv,
)
from quarot_onnx.ops.graph import (
    OPERATORS,
    declare,
    function,
    node,
)
from quarot_onnx.ops.linear import (
    int4_gemm,
    pack_int4,
    quantize_int4,
    unpack_int4,
    weight_only_gemm_groups,
)
from quarot_onnx.ops.operator import (
    ACTIVATION_ZERO_POINT,
    DOMAIN,
    OPSET,
    PACKED_BITS,
    VERSION,
    Array,
    Codes,
    Float32,
    Operator,
)
from quarot_onnx.ops.rotations import (
    hadamard,
    hadamard_heads,
)

__all__ = [
    "ACTIVATION_ZERO_POINT",
    "DOMAIN",
    "OPERATORS",
    "OPSET",
    "PACKED_BITS",
    "VERSION",
    "Array",
    "Codes",
    "Float32",
    "Operator",
    "attention_sinks",
    "declare",
    "function",
    "hadamard",
    "hadamard_heads",
    "int4_gemm",
    "kv_append",
    "kv_append_groups",
    "kv_attention",
    "kv_dequantize",
    "kv_fake_quantize",
    "node",
    "pack_int4",
    "pack_kv",
    "quantize_int4",
    "quantize_kv",
    "unpack_int4",
    "unpack_kv",
    "weight_only_gemm_groups",
]
