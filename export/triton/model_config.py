# SPDX-License-Identifier: Apache-2.0
"""``config.pbtxt`` through protobuf: the part of Triton's ModelConfig that is written here.

The messages have the names, numbers and types of ``model_config.proto`` of Triton Inference Server
(package ``inference``), so that what is written parses as the whole schema and on the wire. They
are defined here because ``tritonclient``, which carries them all, demands a protobuf older than the
one that onnx works with; a test parses the files with tritonclient's own.
"""

from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
)

from quarot_onnx.errors import InputError

_DATA_TYPES = {
    "TYPE_INVALID": 0,
    "TYPE_BOOL": 1,
    "TYPE_UINT8": 2,
    "TYPE_UINT32": 4,
    "TYPE_UINT64": 5,
    "TYPE_INT8": 6,
    "TYPE_INT32": 8,
    "TYPE_INT64": 9,
    "TYPE_FP16": 10,
    "TYPE_FP32": 11,
    "TYPE_STRING": 13,
    "TYPE_BF16": 14,
}
_KINDS = {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3}

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "string": _Field.TYPE_STRING,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint64": _Field.TYPE_UINT64,
    "bool": _Field.TYPE_BOOL,
}

# message -> (field, number, type, repeated)
_MESSAGES: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    "ModelTensorReshape": (("shape", 1, "int64", True),),
    "ModelInput": (
        ("name", 1, "string", False),
        ("data_type", 2, "DataType", False),
        ("dims", 4, "int64", True),
        ("reshape", 5, "ModelTensorReshape", False),
        ("optional", 8, "bool", False),
    ),
    "ModelOutput": (
        ("name", 1, "string", False),
        ("data_type", 2, "DataType", False),
        ("dims", 3, "int64", True),
    ),
    "ModelInstanceGroup": (
        ("count", 2, "int32", False),
        ("kind", 4, "ModelInstanceGroup.Kind", False),
        ("profile", 5, "string", True),
    ),
    "ModelParameter": (("string_value", 1, "string", False),),
    "ModelTransactionPolicy": (("decoupled", 1, "bool", False),),
    "ModelSequenceBatching": (
        ("max_sequence_idle_microseconds", 1, "uint64", False),
        ("direct", 3, "ModelSequenceBatching.StrategyDirect", False),
        ("state", 5, "ModelSequenceBatching.State", True),
    ),
    "ModelSequenceBatching.StrategyDirect": (("max_queue_delay_microseconds", 1, "uint64", False),),
    "ModelSequenceBatching.State": (
        ("input_name", 1, "string", False),
        ("output_name", 2, "string", False),
        ("data_type", 3, "DataType", False),
        ("dims", 4, "int64", True),
        ("initial_state", 5, "ModelSequenceBatching.InitialState", True),
        ("use_same_buffer_for_input_output", 6, "bool", False),
    ),
    "ModelSequenceBatching.InitialState": (
        ("data_type", 1, "DataType", False),
        ("dims", 2, "int64", True),
        ("zero_data", 3, "bool", False),
        ("name", 5, "string", False),
    ),
    "ModelConfig": (
        ("name", 1, "string", False),
        ("platform", 2, "string", False),
        ("max_batch_size", 4, "int32", False),
        ("input", 5, "ModelInput", True),
        ("output", 6, "ModelOutput", True),
        ("instance_group", 7, "ModelInstanceGroup", True),
        ("sequence_batching", 13, "ModelSequenceBatching", False),
        ("parameters", 14, "ModelConfig.ParametersEntry", True),
        ("backend", 17, "string", False),
        ("model_transaction_policy", 19, "ModelTransactionPolicy", False),
    ),
}


def _add_fields(
    message: descriptor_pb2.DescriptorProto, fields: tuple[tuple[str, int, str, bool], ...]
) -> None:
    for name, number, kind, repeated in fields:
        field = message.field.add(name=name, number=number)
        field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
        if kind in _TYPES:
            field.type = _TYPES[kind]
        else:
            is_enum = kind in ("DataType", "ModelInstanceGroup.Kind")
            field.type = _Field.TYPE_ENUM if is_enum else _Field.TYPE_MESSAGE
            field.type_name = f".inference.{kind}"


def _add_enum(enum: descriptor_pb2.EnumDescriptorProto, values: dict[str, int]) -> None:
    for name, number in values.items():
        enum.value.add(name=name, number=number)


def _model_config_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="quarot_onnx/model_config.proto", package="inference", syntax="proto3"
    )
    _add_enum(file.enum_type.add(name="DataType"), _DATA_TYPES)
    added: dict[str, descriptor_pb2.DescriptorProto] = {}
    for name, fields in _MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        message = added[outer].nested_type.add(name=inner) if outer else file.message_type.add()
        message.name = inner
        added[name] = message
        _add_fields(message, fields)
        if name == "ModelInstanceGroup":
            _add_enum(message.enum_type.add(name="Kind"), _KINDS)
        if name == "ModelConfig":
            entry = message.nested_type.add(name="ParametersEntry")
            entry.options.map_entry = True
            _add_fields(entry, (("key", 1, "string", False), ("value", 2, "ModelParameter", False)))
    pool = descriptor_pool.DescriptorPool()  # of its own: tritonclient fills the default one
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


ModelConfig: Any = _model_config_class()
"""``inference.ModelConfig``, with the fields above."""


def to_text(config: Any) -> str:
    """The text form that Triton reads, which parses back to the same message."""
    text: str = text_format.MessageToString(config)
    if from_text(text) != config:
        raise AssertionError("config.pbtxt does not parse back")
    return text


def from_text(text: str, where: str = "config.pbtxt") -> Any:
    """The message in `text`.

    Raises:
        InputError: not the text form of a ModelConfig with the fields above.
    """
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise InputError(
            f"{where}: is not a Triton model configuration ({error}); write the repository again"
        ) from error
