# SPDX-License-Identifier: Apache-2.0
"""A graph without its weights: onnx-graphsurgeon for the structure, lazy tensors for the numbers.

GraphSurgeon would hold every weight that it is given (10 GB of a model whose skeleton takes 0.1
GB), so it gets external references, and what is written under each name is computed by the writer.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from quarot_onnx import ops
from quarot_onnx.artifacts import MODEL
from quarot_onnx.errors import InputError

Array = NDArray[Any]
Shape = list[int | str]
_ELSEWHERE = "elsewhere"  # where a skeleton says that a weight is; no file of that name is written


class Skeleton:
    """The graph of an artifact, ready to be rewritten.

    Attributes:
        proto: the graph as it is in the artifact.
        graph: GraphSurgeon's view of it; functions are gone, so a plugin that is missing cannot be
            replaced silently by a function body.
        weights: the artifact's initializers, read when used.
        float_type: what the float parts are, HALF or BF16, as ONNX numbers it.
    """

    def __init__(self, artifact: Path, float_type: int) -> None:
        """Read the graph.

        Raises:
            InputError: ``model.onnx`` cannot be parsed.
        """
        path = artifact / MODEL
        try:
            self.proto = onnx.load(str(path), load_external_data=False)
            source = ir.load(path)
        except (OSError, DecodeError, ValueError, ir.serde.SerdeError) as error:
            raise InputError(
                f"{path}: is damaged ({type(error).__name__}); export again"
            ) from error
        bare = onnx.ModelProto()
        bare.CopyFrom(self.proto)
        del bare.functions[:]
        self.graph: Any = gs.import_onnx(bare)
        self.weights: dict[str, ir.TensorProtocol] = {
            name: value.const_value
            for name, value in source.graph.initializers.items()
            if value.const_value is not None
        }
        self.float_type = float_type
        self._stored: dict[str, ir.TensorProtocol] = {}
        self._constants: dict[str, Any] = {}

    # --- What is in it ---

    def nodes(self, *operators: str) -> list[Any]:
        """The nodes of these ``quarot`` operators, or of these standard ones, in order."""
        return [node for node in self.graph.nodes if node.op in operators]

    def values(self, tensor: Any) -> Array:
        """The numbers of a constant of the artifact."""
        if tensor.name in self.weights:
            return np.asarray(self.weights[tensor.name].numpy())
        return np.asarray(tensor.values)

    # --- What is put into it ---

    def constant(self, name: str, array: Array) -> Any:
        """A small constant, shared by name."""
        if name not in self._constants:
            self._constants[name] = gs.Constant(name, np.ascontiguousarray(array))
        return self._constants[name]

    def stored(
        self, name: str, dtype: int, shape: Iterable[int], compute: Callable[[], Array]
    ) -> Any:
        """A weight that is computed when the graph is written."""
        sizes = list(shape)

        def tensor() -> ir.TensorProtocol:
            array = compute()
            assert list(array.shape) == sizes, (name, array.shape, sizes)
            return ir.tensor(array, dtype=ir.DataType(dtype), name=name)

        self._stored[name] = ir.LazyTensor(
            tensor, dtype=ir.DataType(dtype), shape=ir.Shape(sizes), name=name
        )
        reference = onnx.TensorProto(name=name, data_type=dtype, dims=sizes)
        reference.data_location = onnx.TensorProto.EXTERNAL
        reference.external_data.add(key="location", value=_ELSEWHERE)
        return gs.Constant(name, LazyValues(reference))

    def variable(self, name: str, dtype: int, shape: Shape | None) -> Any:
        """A tensor that a node will write."""
        kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
        return gs.Variable(name, dtype if dtype == onnx.TensorProto.BFLOAT16 else kind, shape)

    def add(
        self,
        operator: str,
        name: str,
        inputs: list[Any],
        outputs: list[Any],
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """A standard node; `finish` puts it in its place."""
        self.graph.nodes.append(gs.Node(operator, name, attributes or {}, inputs, outputs))

    def add_plugin(
        self,
        operator: str,
        name: str,
        inputs: list[Any],
        outputs: list[Any],
        attributes: dict[str, Any],
    ) -> None:
        """A plugin node; both attributes are what TensorRT 10.15 and later look plugins up by."""
        found = {"plugin_namespace": ops.DOMAIN, "plugin_version": str(ops.VERSION)}
        node = gs.Node(operator, name, {**attributes, **found}, inputs, outputs, domain=ops.DOMAIN)
        self.graph.nodes.append(node)

    def derive(
        self, tensor: Any, suffix: str, shape: Shape | None, dtype: int | None = None
    ) -> Any:
        """A tensor named after another, by default of the float type."""
        return self.variable(f"{tensor.name}{suffix}", dtype or self.float_type, shape)

    def replace(self, old: Any, new: Any) -> None:
        """Let every reader of `old`, and the graph's outputs, read `new`."""
        for reader in list(old.outputs):
            for position, value in enumerate(reader.inputs):
                if value is old:
                    reader.inputs[position] = new
        self.graph.outputs = [new if output is old else output for output in self.graph.outputs]

    # --- What comes out ---

    def finish(self, opset: int) -> ir.Model:
        """The rewritten model, without what nothing reads, its weights lazy."""
        self.graph.cleanup(remove_unused_graph_inputs=True).toposort()
        self.graph.opset = opset
        self.graph.import_domains = [
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(ops.DOMAIN, ops.VERSION),
        ]
        proto = gs.export_onnx(self.graph)
        proto.ir_version = self.proto.ir_version
        proto.metadata_props.extend(self.proto.metadata_props)
        model: ir.Model = ir.from_proto(proto)
        for name, value in model.graph.initializers.items():
            held = self._stored.get(name) or self.weights.get(name)
            if held is not None:
                value.const_value = held
        return model
