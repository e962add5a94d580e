// SPDX-License-Identifier: Apache-2.0
// What a plugin is, apart from TensorRT's life cycle: a table of its tensors and attributes, its
// output shapes, and the kernel call that its tensors make. plugin.cpp gives every operator the
// same life.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../include/quarot_kernels.h"
#include "tensorrt.hpp"

namespace quarot {

enum class Type {
  kFLOATING,  // HALF or BF16, the same for every such tensor of a node
  kCHOSEN,    // HALF or BF16 by the attribute `dtype`
  kINT8,
  kINT32,
  kFLOAT,
  kBOOL
};

// For people: "HALF, BF16", or "dtype" where that attribute decides.
char const* typeNames(Type type);

struct TensorSpec {
  char const* name;
  Type type;
  char const* shape;  // for people: "[..., n]"
  bool optional{false};
  int32_t alias{-1};  // of an output: the input whose memory it shares
};

enum class AttributeKind { kINT, kFLOAT, kINTS };

struct AttributeSpec {
  char const* name;
  AttributeKind kind;
  bool required;
  double initial;                // where it is not required; kINTS: none
  std::vector<int32_t> choices;  // kINT: the values that are allowed
  double above, most;            // kFLOAT: above < value <= most
  std::string allowed() const;   // for people: "4", "above 0, at most 1"
};

struct AttributeValue {
  int32_t integer{};
  float real{};
  std::vector<int32_t> integers{};
};

// Values in the order of the operator's attributes.
using Attributes = std::vector<AttributeValue>;

// The tensors of a call. `in` and `out` hold their sizes; the pointers are null while only sizes
// are known.
struct Call {
  nvinfer1::PluginTensorDesc const* in;
  int32_t nbInputs;
  nvinfer1::PluginTensorDesc const* out;
  void const* const* inputs;
  void* const* outputs;
  void* workspace;
  size_t workspaceBytes;
  cudaStream_t stream;
};

// Thrown while a plugin looks at what it is given; plugin.cpp logs it and refuses.
struct Refusal {
  std::string message;
};

class Operator {
 public:
  Operator(char const* name, std::vector<TensorSpec> inputs, std::vector<TensorSpec> outputs,
           std::vector<AttributeSpec> attributes)
      : mName(name),
        mInputs(std::move(inputs)),
        mOutputs(std::move(outputs)),
        mAttributes(std::move(attributes)) {}
  virtual ~Operator() = default;

  char const* name() const { return mName; }
  std::vector<TensorSpec> const& inputs() const { return mInputs; }
  std::vector<TensorSpec> const& outputs() const { return mOutputs; }
  std::vector<AttributeSpec> const& attributes() const { return mAttributes; }
  int32_t requiredInputs() const;

  // Throws Refusal where values that are allowed one by one do not go together.
  virtual void check(Attributes const&) const {}
  // Sets nbDims and d of every output. The ranks of the inputs have not been looked at.
  virtual void outputShapes(Attributes const& attributes, nvinfer1::DimsExprs const* in,
                            int32_t nbInputs, nvinfer1::DimsExprs* out,
                            nvinfer1::IExprBuilder& builder) const = 0;
  // Throws Refusal, with the kernels' reason, where they have no such shapes. Launches nothing.
  virtual void checkShapes(Attributes const& attributes, Call const& call) const = 0;
  // Bytes for the sizes of the call.
  virtual size_t workspaceSize(Attributes const& attributes, Call const& call) const = 0;
  // Launches on call.stream; throws Refusal.
  virtual void enqueue(Attributes const& attributes, Call const& call) const = 0;

 protected:
  AttributeValue const& value(Attributes const& attributes, char const* name) const;

 private:
  char const* mName;
  std::vector<TensorSpec> mInputs, mOutputs;
  std::vector<AttributeSpec> mAttributes;
};

// Every operator that has a plugin; their order is that of quarot_onnx.ops.
std::vector<Operator const*> const& operators();

// The attributes of a node, checked strictly; throws Refusal with the attribute and what it may be.
Attributes parseAttributes(Operator const& op, nvinfer1::PluginFieldCollection const* fields);

// "bits=4, clip_ratio=0.9", for logs and timing caches: equal texts are equal attributes.
std::string describe(Operator const& op, Attributes const& attributes);

// What the library is, as JSON: versions, backend, and the tables above.
char const* libraryDescription();

// ---- shapes

std::string text(nvinfer1::Dims const& dims);
// Throws Refusal unless the tensor has this many axes, none of them negative.
void requireRank(char const* name, nvinfer1::Dims const& dims, int32_t rank);
// Throws Refusal unless the tensor has exactly these sizes.
void requireDims(char const* name, nvinfer1::Dims const& dims, std::vector<int64_t> const& wanted);
// The product of all axes but the last `last` ones.
int64_t leading(nvinfer1::Dims const& dims, int32_t last);
// Throws Refusal with the kernels' words unless the status is QR_OK.
void require(int status, char const* call, std::string const& sizes);
// The same for a call without tensors, which says whether the kernels take its sizes.
void requireSizes(int status, char const* call, std::string const& sizes);
// Rank of a symbolic shape; throws Refusal outside of `least`..MAX_DIMS.
int32_t requireSymbolicRank(char const* name, nvinfer1::DimsExprs const& dims, int32_t least);

// qr_dtype of a floating tensor.
int32_t kernelDtype(nvinfer1::DataType type);

}  // namespace quarot
