# SPDX-License-Identifier: Apache-2.0
"""What an operator is, and what all of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOMAIN = "quarot"
VERSION = 1
OPSET = 23

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Codes = NDArray[np.uint8]

ACTIVATION_ZERO_POINT = 128
"""What portable storage adds to a signed activation code to make it a uint8."""

PACKED_BITS = 4
"""Cache codes of up to so many bits are stored two to a byte."""


@dataclass(frozen=True)
class Operator:
    """One operator: its interface, its ONNX function body and its NumPy reference.

    Attributes:
        name: op_type in the domain ``quarot``; the TensorRT plugin has the same name.
        inputs: names in order; all are required.
        outputs: names in order.
        attributes: name -> type, each required on every node.
        body: the statements of the ONNX function, in ONNX's own syntax. ``@name`` is an attribute
            of the calling node; ONNX Runtime inlines the body and folds everything that depends on
            attributes and initializers only.
        reference: the NumPy function that defines the meaning.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    body: str
    reference: Callable[..., Any]
