// SPDX-License-Identifier: Apache-2.0
// The life of every plugin: created from fields, asked for types, shapes and formats, configured,
// serialized, cloned for a context, told its shapes, enqueued. No function here lets an exception
// out: a Refusal becomes a logged line and a status.
#include "plugin.hpp"

#include <new>

#include "host.hpp"

#ifndef QR_BUILD_ID
#error "the build defines QR_BUILD_ID, a hash of the sources"
#endif

namespace quarot {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kREFUSED{-1};

// Runs `what`; a Refusal is logged under the plugin's name.
template <class What>
int32_t guarded(Operator const& op, std::string const& layer, What&& what) noexcept {
  std::string reason;
  try {
    what();
    return 0;
  } catch (Refusal const& refusal) {
    reason = refusal.message;
  } catch (std::bad_alloc const&) {
    reason = "out of host memory";
  }
  try {
    log(Severity::kERROR,
        std::string(op.name()) + (layer.empty() ? "" : " (" + layer + ")") + ": " + reason);
  } catch (std::bad_alloc const&) {
  }
  return kREFUSED;
}

bool isFloating(DataType type) { return type == DataType::kHALF || type == DataType::kBF16; }

// Build is IPluginV3OneBuild, or IPluginV3OneBuildV2 where outputs share memory with inputs:
// TensorRT before 10.3 does not know the latter, and the other plugins need not wait for it.
template <class Build>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public Build,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(Operator const& op, Attributes attributes, std::string layer)
      : mOperator(op), mAttributes(std::move(attributes)), mLayer(std::move(layer)) {
    mDescription = describe(op, mAttributes);
    mTimingCacheId = std::string(kNAMESPACE) + "." + op.name() + "." + kVERSION + "." QR_BUILD_ID +
                     ": " + mDescription;
  }

  // IPluginV3

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<Build*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    nvinfer1::IPluginV3* copy = nullptr;
    guarded(mOperator, mLayer, [&] { copy = new Plugin(mOperator, mAttributes, mLayer); });
    return copy;
  }

  // IPluginV3OneCore

  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mOperator.name(); }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVERSION; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

  // IPluginV3OneBuild

  int32_t getNbOutputs() const noexcept override { return nbOutputs(); }

  int32_t getOutputDataTypes(DataType* outputTypes, int32_t given, DataType const* inputTypes,
                             int32_t nbInputs) const noexcept override {
    return guarded(mOperator, mLayer, [&] {
      requireCounts(nbInputs, given);
      requirePointers({outputTypes, inputTypes});
      for (int32_t i = 0; i < nbInputs; i++) requireType(i, inputTypes[i], inputTypes[0]);
      for (int32_t i = 0; i < given; i++)
        outputTypes[i] = typeOf(mOperator.outputs()[i].type, inputTypes[0]);
    });
  }

  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                          nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                          int32_t given, nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(mOperator, mLayer, [&] {
      requireCounts(nbInputs, given);
      requirePointers({inputs, outputs});
      mOperator.outputShapes(mAttributes, inputs, nbInputs, outputs, builder);
    });
  }

  bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut,
                                 int32_t nbInputs, int32_t given) noexcept override {
    if (!inOut || nbInputs < mOperator.requiredInputs() || nbInputs > mostInputs() ||
        given != nbOutputs() || pos < 0 || pos >= nbInputs + given)
      return false;
    PluginTensorDesc const& desc = inOut[pos].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    DataType const first = inOut[0].desc.type;
    if (pos < nbInputs) return allows(mOperator.inputs()[pos].type, desc.type, first);
    Type const type = mOperator.outputs()[pos - nbInputs].type;
    return allows(type, desc.type, first) && desc.type == typeOf(type, first);
  }

  // Refuses, while the engine is built, the sizes that enqueue would.
  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                          DynamicPluginTensorDesc const* out, int32_t given) noexcept override {
    return guarded(mOperator, mLayer, [&] {
      requireCounts(nbInputs, given);
      requirePointers({in, out});
      std::vector<PluginTensorDesc> sizes = largest(in, nbInputs);
      mOperator.checkShapes(mAttributes, callOf(sizes.data(), nbInputs));
    });
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                          DynamicPluginTensorDesc const* out,
                          int32_t given) const noexcept override {
    size_t bytes = 0;
    guarded(mOperator, mLayer, [&] {
      requireCounts(nbInputs, given);
      requirePointers({in, out});
      std::vector<PluginTensorDesc> sizes = largest(in, nbInputs);
      bytes = mOperator.workspaceSize(mAttributes, callOf(sizes.data(), nbInputs));
    });
    return bytes;
  }

  char const* getTimingCacheID() noexcept override { return mTimingCacheId.c_str(); }
  char const* getMetadataString() noexcept override { return mDescription.c_str(); }

  // Of IPluginV3OneBuildV2; with IPluginV3OneBuild nobody calls it.
  int32_t getAliasedInput(int32_t outputIndex) noexcept {
    return outputIndex >= 0 && outputIndex < nbOutputs() ? mOperator.outputs()[outputIndex].alias
                                                         : -1;
  }

  // IPluginV3OneRuntime

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out,
                        int32_t given) noexcept override {
    mNbInputs = 0;
    return guarded(mOperator, mLayer, [&] {
      requireCounts(nbInputs, given);
      requirePointers({in, out});
      for (int32_t i = 0; i < nbInputs; i++) requireType(i, in[i].type, in[0].type);
      Call const call = callOf(in, nbInputs);
      mOperator.checkShapes(mAttributes, call);
      mWorkspaceBytes = mOperator.workspaceSize(mAttributes, call);
      mNbInputs = nbInputs;
    });
  }

  int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded(mOperator, mLayer, [&] {
      if (mNbInputs == 0) throw Refusal{"enqueue before the shapes are known; call onShapeChange"};
      requirePointers({inputDesc, outputDesc, inputs, outputs});
      for (int32_t i = 0; i < mNbInputs; i++) requirePointers({inputs[i]});
      for (int32_t i = 0; i < nbOutputs(); i++) requirePointers({outputs[i]});
      Call call = callOf(inputDesc, mNbInputs);
      call.out = outputDesc;
      call.inputs = inputs;
      call.outputs = outputs;
      call.workspace = workspace;
      call.workspaceBytes = mWorkspaceBytes;
      call.stream = stream;
      mOperator.enqueue(mAttributes, call);
    });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    guarded(mOperator, mLayer, [&] {
      mFields.clear();
      for (size_t i = 0; i < mAttributes.size(); i++) {
        AttributeSpec const& spec = mOperator.attributes()[i];
        AttributeValue const& value = mAttributes[i];
        if (spec.kind == AttributeKind::kFLOAT)
          mFields.emplace_back(spec.name, &value.real, PluginFieldType::kFLOAT32, 1);
        else if (spec.kind == AttributeKind::kINT)
          mFields.emplace_back(spec.name, &value.integer, PluginFieldType::kINT32, 1);
        else if (!value.integers.empty())
          mFields.emplace_back(spec.name, value.integers.data(), PluginFieldType::kINT32,
                               static_cast<int32_t>(value.integers.size()));
      }
      mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    });
    return &mCollection;
  }

 private:
  int32_t nbOutputs() const { return static_cast<int32_t>(mOperator.outputs().size()); }
  int32_t mostInputs() const { return static_cast<int32_t>(mOperator.inputs().size()); }

  void requireCounts(int32_t nbInputs, int32_t given) const {
    if (nbInputs < mOperator.requiredInputs() || nbInputs > mostInputs() || given != nbOutputs())
      throw Refusal{std::to_string(nbInputs) + " inputs and " + std::to_string(given) +
                    " outputs; give " + std::to_string(mOperator.requiredInputs()) + " to " +
                    std::to_string(mostInputs()) + " and " + std::to_string(nbOutputs())};
  }

  static void requirePointers(std::initializer_list<void const*> pointers) {
    for (void const* pointer : pointers)
      if (!pointer) throw Refusal{"a null pointer; give the tensors' memory"};
  }

  void requireType(int32_t input, DataType given, DataType first) const {
    TensorSpec const& spec = mOperator.inputs()[input];
    if (!allows(spec.type, given, first))
      throw Refusal{std::string(spec.name) + " has data type " +
                    std::to_string(static_cast<int32_t>(given)) +
                    "; allowed: " + typeNames(spec.type) +
                    (spec.type == Type::kFLOATING
                         ? ", one of them in all inputs (export with --dtype float16 or bfloat16)"
                         : "")};
  }

  // `first` is the type of input 0, which every floating operator has as its floating type.
  static bool allows(Type type, DataType given, DataType first) {
    switch (type) {
      case Type::kFLOATING:
        return isFloating(given) && given == first;
      case Type::kCHOSEN:
        return isFloating(given);
      case Type::kINT8:
        return given == DataType::kINT8;
      case Type::kINT32:
        return given == DataType::kINT32;
      case Type::kFLOAT:
        return given == DataType::kFLOAT;
      case Type::kBOOL:
        return given == DataType::kBOOL;
    }
    return false;
  }

  DataType typeOf(Type type, DataType first) const {
    switch (type) {
      case Type::kFLOATING:
        return first;
      case Type::kCHOSEN:  // ONNX's numbers
        for (size_t i = 0; i < mAttributes.size(); i++)
          if (std::string(mOperator.attributes()[i].name) == "dtype")
            return mAttributes[i].integer == 10 ? DataType::kHALF : DataType::kBF16;
        return DataType::kHALF;
      case Type::kINT8:
        return DataType::kINT8;
      case Type::kINT32:
        return DataType::kINT32;
      case Type::kFLOAT:
        return DataType::kFLOAT;
      case Type::kBOOL:
        return DataType::kBOOL;
    }
    return DataType::kFLOAT;
  }

  static std::vector<PluginTensorDesc> largest(DynamicPluginTensorDesc const* in, int32_t count) {
    std::vector<PluginTensorDesc> sizes;
    for (int32_t i = 0; i < count; i++) {
      sizes.push_back(in[i].desc);
      sizes.back().dims = in[i].max;
    }
    return sizes;
  }

  static Call callOf(PluginTensorDesc const* in, int32_t nbInputs) {
    return {in, nbInputs, nullptr, nullptr, nullptr, nullptr, 0, nullptr};
  }

  Operator const& mOperator;
  Attributes const mAttributes;
  std::string mLayer, mDescription, mTimingCacheId;
  int32_t mNbInputs{0};  // 0 until shapes are known
  size_t mWorkspaceBytes{0};
  std::vector<PluginField> mFields;
  nvinfer1::PluginFieldCollection mCollection{};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Operator const& op) : mOperator(op) {
    for (AttributeSpec const& spec : op.attributes())
      mFields.emplace_back(
          spec.name, nullptr,
          spec.kind == AttributeKind::kFLOAT ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32,
          spec.kind == AttributeKind::kINTS ? 0 : 1);
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
  }

  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name,
                                    nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    nvinfer1::IPluginV3* plugin = nullptr;
    try {
      std::string const layer = name ? name : "";
      guarded(mOperator, layer, [&] {
        Attributes attributes = parseAttributes(mOperator, fields);
        bool aliased = false;
        for (TensorSpec const& output : mOperator.outputs()) aliased |= output.alias >= 0;
        if (aliased)
          plugin =
              new Plugin<nvinfer1::IPluginV3OneBuildV2>(mOperator, std::move(attributes), layer);
        else
          plugin = new Plugin<nvinfer1::IPluginV3OneBuild>(mOperator, std::move(attributes), layer);
      });
    } catch (std::bad_alloc const&) {
    }
    return plugin;
  }

  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mOperator.name(); }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVERSION; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

 private:
  Operator const& mOperator;
  std::vector<PluginField> mFields;
  nvinfer1::PluginFieldCollection mCollection{};
};

}  // namespace

// Never destroyed: TensorRT may hold on to them until the process ends.
std::vector<nvinfer1::IPluginCreatorInterface*> const& creators() {
  static auto const* const all = [] {
    auto* const list = new std::vector<nvinfer1::IPluginCreatorInterface*>;
    for (Operator const* op : operators()) list->push_back(new Creator(*op));
    return list;
  }();
  return *all;
}

}  // namespace quarot
