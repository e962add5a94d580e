// SPDX-License-Identifier: Apache-2.0
#include "operator.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace quarot {

using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

std::string number(double value) {
  char buffer[32];
  snprintf(buffer, sizeof buffer, "%.9g", value);
  return buffer;
}

std::string list(std::vector<int32_t> const& values) {
  std::string out;
  for (int32_t const value : values) out += (out.empty() ? "" : ", ") + std::to_string(value);
  return "[" + out + "]";
}

// One integer of a field, whatever its width; the ONNX parser gives INT32, Python also INT64.
int64_t integerAt(PluginField const& field, int32_t index) {
  char const* const data = static_cast<char const*>(field.data);
  if (field.type == PluginFieldType::kINT32) {
    int32_t value;
    memcpy(&value, data + sizeof value * index, sizeof value);
    return value;
  }
  int64_t value;
  memcpy(&value, data + sizeof value * index, sizeof value);
  return value;
}

double realOf(PluginField const& field) {
  if (field.type == PluginFieldType::kFLOAT32) {
    float value;
    memcpy(&value, field.data, sizeof value);
    return value;
  }
  double value;
  memcpy(&value, field.data, sizeof value);
  return value;
}

[[noreturn]] void refuse(AttributeSpec const& spec, std::string const& given) {
  throw Refusal{std::string(spec.name) + " = " + given + "; allowed: " + spec.allowed()};
}

constexpr int32_t kLONGEST_LIST{64};

AttributeValue parse(AttributeSpec const& spec, PluginField const& field) {
  bool const isReal = spec.kind == AttributeKind::kFLOAT;
  bool const rightType =
      isReal ? field.type == PluginFieldType::kFLOAT32 || field.type == PluginFieldType::kFLOAT64
             : field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
  if (!rightType)
    refuse(spec, "a field of type " + std::to_string(static_cast<int32_t>(field.type)));
  int32_t const longest = spec.kind == AttributeKind::kINTS ? kLONGEST_LIST : 1;
  if (field.length < 1 || field.length > longest || !field.data)
    refuse(spec, std::to_string(field.length) + " values");
  AttributeValue value;
  if (isReal) {
    double const given = realOf(field);
    value.real = static_cast<float>(given);
    if (!(given > spec.above && given <= spec.most) || !std::isfinite(value.real))
      refuse(spec, number(given));
    return value;
  }
  for (int32_t i = 0; i < field.length; i++) {
    int64_t const given = integerAt(field, i);
    bool const known =
        spec.choices.empty()
            ? given >= 1 && given <= std::numeric_limits<int32_t>::max()
            : std::find(spec.choices.begin(), spec.choices.end(), given) != spec.choices.end();
    if (!known) refuse(spec, std::to_string(given));
    value.integer = static_cast<int32_t>(given);
    if (spec.kind == AttributeKind::kINTS) value.integers.push_back(value.integer);
  }
  return value;
}

}  // namespace

std::string AttributeSpec::allowed() const {
  if (kind == AttributeKind::kINTS) return "1 to 64 orders of at least 1";
  if (kind == AttributeKind::kFLOAT)
    return std::isinf(most) || most == std::numeric_limits<float>::max()
               ? "finite, above " + number(above)
               : "above " + number(above) + ", at most " + number(most);
  std::string out;
  for (int32_t const choice : choices) out += (out.empty() ? "" : ", ") + std::to_string(choice);
  return out;
}

char const* typeNames(Type type) {
  switch (type) {
    case Type::kFLOATING:
      return "HALF, BF16";
    case Type::kCHOSEN:
      return "dtype";
    case Type::kINT8:
      return "INT8";
    case Type::kINT32:
      return "INT32";
    case Type::kFLOAT:
      return "FLOAT";
    case Type::kBOOL:
      return "BOOL";
  }
  return "";
}

int32_t Operator::requiredInputs() const {
  return static_cast<int32_t>(
      std::count_if(mInputs.begin(), mInputs.end(), [](auto const& i) { return !i.optional; }));
}

AttributeValue const& Operator::value(Attributes const& attributes, char const* name) const {
  size_t i = 0;
  while (strcmp(mAttributes[i].name, name) != 0) i++;
  return attributes[i];
}

Attributes parseAttributes(Operator const& op, nvinfer1::PluginFieldCollection const* fields) {
  Attributes values(op.attributes().size());
  std::vector<bool> given(values.size(), false);
  int32_t const count = fields && fields->fields ? fields->nbFields : 0;
  for (int32_t i = 0; i < count; i++) {
    PluginField const& field = fields->fields[i];
    std::string const name = field.name ? field.name : "";
    if (name == "plugin_namespace" || name == "plugin_version") continue;
    size_t at = 0;
    while (at < values.size() && name != op.attributes()[at].name) at++;
    if (at == values.size()) {
      std::string names;
      for (AttributeSpec const& spec : op.attributes())
        names += (names.empty() ? "" : ", ") + std::string(spec.name);
      throw Refusal{"\"" + name + "\" is no attribute; allowed: " + names};
    }
    if (given[at]) throw Refusal{name + " is given twice; give it once"};
    given[at] = true;
    values[at] = parse(op.attributes()[at], field);
  }
  for (size_t at = 0; at < values.size(); at++) {
    AttributeSpec const& spec = op.attributes()[at];
    if (given[at]) continue;
    if (spec.required)
      throw Refusal{std::string(spec.name) + " is missing; allowed: " + spec.allowed()};
    values[at].integer = static_cast<int32_t>(spec.initial);
    values[at].real = static_cast<float>(spec.initial);
  }
  op.check(values);
  return values;
}

std::string describe(Operator const& op, Attributes const& attributes) {
  std::string out;
  for (size_t i = 0; i < attributes.size(); i++) {
    AttributeSpec const& spec = op.attributes()[i];
    out += (out.empty() ? "" : ", ") + std::string(spec.name) + "=";
    if (spec.kind == AttributeKind::kFLOAT)
      out += number(attributes[i].real);
    else if (spec.kind == AttributeKind::kINT)
      out += std::to_string(attributes[i].integer);
    else
      out += list(attributes[i].integers);
  }
  return out;
}

std::string text(Dims const& dims) {
  if (dims.nbDims < 0 || dims.nbDims > Dims::MAX_DIMS)
    return "of " + std::to_string(dims.nbDims) + " axes";
  std::string out;
  for (int32_t i = 0; i < dims.nbDims; i++) out += (i ? ", " : "") + std::to_string(dims.d[i]);
  return "[" + out + "]";
}

void requireRank(char const* name, Dims const& dims, int32_t rank) {
  bool right = dims.nbDims == rank && rank <= Dims::MAX_DIMS;
  // 2^40 elements an axis and their products of few axes stay within 63 bits for what fits memory.
  for (int32_t i = 0; right && i < rank; i++)
    right = dims.d[i] >= 0 && dims.d[i] <= int64_t{1} << 40;
  int64_t elements = 1;
  for (int32_t i = 0; right && i < rank; i++)
    right = !__builtin_mul_overflow(elements, dims.d[i], &elements);
  if (!right)
    throw Refusal{std::string(name) + " is " + text(dims) + "; give " + std::to_string(rank) +
                  " axes of known sizes"};
}

void requireDims(char const* name, Dims const& dims, std::vector<int64_t> const& wanted) {
  Dims expected{};
  expected.nbDims = static_cast<int32_t>(wanted.size());
  bool right = dims.nbDims == expected.nbDims;
  for (size_t i = 0; i < wanted.size(); i++) {
    expected.d[i] = wanted[i];
    right = right && dims.d[i] == wanted[i];
  }
  if (!right)
    throw Refusal{std::string(name) + " is " + text(dims) + "; it has to be " + text(expected)};
}

int64_t leading(Dims const& dims, int32_t last) {
  int64_t product = 1;
  for (int32_t i = 0; i < dims.nbDims - last; i++) product *= dims.d[i];
  return product;
}

void require(int status, char const* call, std::string const& sizes) {
  if (status != QR_OK)
    throw Refusal{std::string(call) + "(" + sizes + "): " + qr_status_string(status) +
                  "; see the supported shapes in docs/kernels.md"};
}

void requireSizes(int status, char const* call, std::string const& sizes) {
  if (status != QR_ERROR_NULL_POINTER) require(status, call, sizes);
}

int32_t requireSymbolicRank(char const* name, nvinfer1::DimsExprs const& dims, int32_t least) {
  if (dims.nbDims < least || dims.nbDims > Dims::MAX_DIMS)
    throw Refusal{std::string(name) + " has " + std::to_string(dims.nbDims) +
                  " axes; give at least " + std::to_string(least)};
  for (int32_t i = 0; i < dims.nbDims; i++)
    if (!dims.d[i]) throw Refusal{std::string(name) + " has an axis without a size"};
  return dims.nbDims;
}

int32_t kernelDtype(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kHALF:
      return QR_DTYPE_FP16;
    case nvinfer1::DataType::kBF16:
      return QR_DTYPE_BF16;
    default:
      throw Refusal{"a tensor of type " + std::to_string(static_cast<int32_t>(type)) +
                    "; the kernels take HALF and BF16"};
  }
}

}  // namespace quarot
