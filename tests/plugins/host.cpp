// SPDX-License-Identifier: Apache-2.0
//
// A host for plugins without TensorRT: loads a plugin library as TensorRT's registry does and
// drives each plugin through its life, behind a C ABI for ctypes. Dimension expressions are
// evaluated at once; a size is constant if it was made of constants. Handles are pointers; a null
// one is an error of the test.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "host_abi.hpp"
#include "tensorrt.hpp"

using namespace nvinfer1;

#define HOST_API extern "C" __attribute__((visibility("default")))

namespace {

std::string gLog;

// As TensorRT 11 hands them out.
struct Logger : quarot::trt11::ILogger {
  int getAPILanguage() const noexcept override { return 0; }
  int getInterfaceInfo() const noexcept override { return 0; }
  int destroy() noexcept override { return 0; }
  int destroyAndDelete() noexcept override { return 0; }
  void log(quarot::Severity severity, char const* message) noexcept override {
    gLog += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
  }
};

struct Finder : quarot::trt11::ILoggerFinder {
  Logger logger;
  int getAPILanguage() const noexcept override { return 0; }
  int getInterfaceInfo() const noexcept override { return 0; }
  int destroy() noexcept override { return 0; }
  int destroyAndDelete() noexcept override { return 0; }
  quarot::trt11::ILogger* findLogger() override { return &logger; }
};

Finder gFinder;

struct Size final : IDimensionExpr {
  struct Impl final : apiv::VDimensionExpr {
    bool constant = false;
    int64_t value = 0;
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return constant ? value : -1; }
    bool isSizeTensor() const override { return false; }
  } impl;
  Size() { mImpl = &impl; }
};

struct Builder final : IExprBuilder {
  struct Impl final : apiv::VExprBuilder {
    std::deque<Size> sizes;

    IDimensionExpr const* make(int64_t value, bool constant) {
      Size& size = sizes.emplace_back();
      size.impl.value = value;
      size.impl.constant = constant;
      return &size;
    }
    static int64_t of(IDimensionExpr const& size) {
      return static_cast<Size const&>(size).impl.value;
    }
    IDimensionExpr const* constant(int64_t value) override { return make(value, true); }
    IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& first,
                                    IDimensionExpr const& second) override {
      int64_t const a = of(first), b = of(second);
      bool const constant = first.isConstant() && second.isConstant();
      switch (op) {
        case DimensionOperation::kPROD:
          return make(a * b, constant);
        case DimensionOperation::kFLOOR_DIV:
          return make(a / b, constant);
        case DimensionOperation::kCEIL_DIV:
          return make((a + b - 1) / b, constant);
        default:
          return nullptr;  // no plugin asks for it
      }
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&,
                                            IDimensionExpr const&) override {
      return nullptr;
    }
  } impl;
  Builder() { mImpl = &impl; }
};

IPluginV3OneCore* core(IPluginV3* p) {
  return static_cast<IPluginV3OneCore*>(p->getCapabilityInterface(PluginCapabilityType::kCORE));
}
IPluginV3OneBuild* build(IPluginV3* p) {
  return static_cast<IPluginV3OneBuild*>(p->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime* runtime(IPluginV3* p) {
  return static_cast<IPluginV3OneRuntime*>(
      p->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

}  // namespace

// Null where the library cannot be loaded.
HOST_API void* host_open(char const* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return nullptr;
  if (void* const set = dlsym(library, "setLoggerFinder"))
    reinterpret_cast<void (*)(void*)>(set)(&gFinder);
  return library;
}

HOST_API int32_t host_creators(void* library, IPluginCreatorInterface* const** list) {
  using Get = IPluginCreatorInterface* const* (*)(int32_t&);
  int32_t count = 0;
  *list = reinterpret_cast<Get>(dlsym(library, "getCreators"))(count);
  return count;
}

HOST_API IPluginCreatorV3One* host_creator(void* library, int32_t index) {
  IPluginCreatorInterface* const* list = nullptr;
  if (index >= host_creators(library, &list)) return nullptr;
  InterfaceInfo const info = list[index]->getInterfaceInfo();
  return strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0
             ? static_cast<IPluginCreatorV3One*>(list[index])
             : nullptr;
}

HOST_API char const* host_log() { return gLog.c_str(); }
HOST_API void host_clear_log() { gLog.clear(); }

HOST_API char const* creator_name(IPluginCreatorV3One* c) { return c->getPluginName(); }
HOST_API char const* creator_version(IPluginCreatorV3One* c) { return c->getPluginVersion(); }
HOST_API char const* creator_namespace(IPluginCreatorV3One* c) { return c->getPluginNamespace(); }
HOST_API PluginFieldCollection const* creator_fields(IPluginCreatorV3One* c) {
  return c->getFieldNames();
}
HOST_API IPluginV3* creator_create(IPluginCreatorV3One* c, char const* name,
                                   PluginFieldCollection const* fields, int32_t phase) {
  return c->createPlugin(name, fields, static_cast<TensorRTPhase>(phase));
}

HOST_API void plugin_destroy(IPluginV3* p) { delete p; }
HOST_API IPluginV3* plugin_clone(IPluginV3* p) { return p->clone(); }
HOST_API IPluginV3* plugin_attach(IPluginV3* p) { return runtime(p)->attachToContext(nullptr); }
HOST_API char const* plugin_name(IPluginV3* p) { return core(p)->getPluginName(); }
HOST_API char const* plugin_namespace(IPluginV3* p) { return core(p)->getPluginNamespace(); }
HOST_API char const* plugin_version(IPluginV3* p) { return core(p)->getPluginVersion(); }
HOST_API int32_t plugin_build_version(IPluginV3* p) { return build(p)->getInterfaceInfo().major; }
HOST_API int32_t plugin_outputs(IPluginV3* p) { return build(p)->getNbOutputs(); }
HOST_API char const* plugin_timing_cache_id(IPluginV3* p) { return build(p)->getTimingCacheID(); }
HOST_API char const* plugin_metadata(IPluginV3* p) { return build(p)->getMetadataString(); }
HOST_API int32_t plugin_tactics(IPluginV3* p) { return build(p)->getNbTactics(); }
HOST_API int32_t plugin_aliased_input(IPluginV3* p, int32_t output) {
  auto* const b = build(p);
  return b->getInterfaceInfo().major >= 2
             ? static_cast<IPluginV3OneBuildV2*>(b)->getAliasedInput(output)
             : -1;
}
HOST_API int32_t plugin_output_types(IPluginV3* p, int32_t* out, int32_t outputs, int32_t const* in,
                                     int32_t inputs) {
  return build(p)->getOutputDataTypes(reinterpret_cast<DataType*>(out), outputs,
                                      reinterpret_cast<DataType const*>(in), inputs);
}

// A size below 0 is a dynamic one of -size; is_constant: [outputs * 8].
HOST_API int32_t plugin_output_shapes(IPluginV3* p, Dims const* in, int32_t inputs, Dims* out,
                                      int32_t outputs, int32_t* is_constant) {
  Builder builder;
  std::vector<DimsExprs> given(inputs), made(outputs);
  for (int32_t i = 0; i < inputs; i++) {
    given[i].nbDims = in[i].nbDims;
    for (int32_t k = 0; k < std::min(in[i].nbDims, Dims::MAX_DIMS); k++)
      given[i].d[k] = builder.impl.make(std::abs(in[i].d[k]), in[i].d[k] >= 0);
  }
  int32_t const status =
      build(p)->getOutputShapes(given.data(), inputs, nullptr, 0, made.data(), outputs, builder);
  if (status) return status;
  for (int32_t i = 0; i < outputs; i++) {
    out[i].nbDims = made[i].nbDims;
    for (int32_t k = 0; k < made[i].nbDims; k++) {
      out[i].d[k] = Builder::Impl::of(*made[i].d[k]);
      is_constant[i * Dims::MAX_DIMS + k] = made[i].d[k]->isConstant();
    }
  }
  return 0;
}

HOST_API int32_t plugin_supports(IPluginV3* p, int32_t position,
                                 DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) {
  return build(p)->supportsFormatCombination(position, tensors, inputs, outputs);
}
HOST_API int32_t plugin_configure(IPluginV3* p, DynamicPluginTensorDesc const* in, int32_t inputs,
                                  DynamicPluginTensorDesc const* out, int32_t outputs) {
  return build(p)->configurePlugin(in, inputs, out, outputs);
}
HOST_API size_t plugin_workspace(IPluginV3* p, DynamicPluginTensorDesc const* in, int32_t inputs,
                                 DynamicPluginTensorDesc const* out, int32_t outputs) {
  return build(p)->getWorkspaceSize(in, inputs, out, outputs);
}
HOST_API PluginFieldCollection const* plugin_fields(IPluginV3* p) {
  return runtime(p)->getFieldsToSerialize();
}
HOST_API int32_t plugin_set_tactic(IPluginV3* p, int32_t tactic) {
  return runtime(p)->setTactic(tactic);
}
HOST_API int32_t plugin_on_shape_change(IPluginV3* p, PluginTensorDesc const* in, int32_t inputs,
                                        PluginTensorDesc const* out, int32_t outputs) {
  return runtime(p)->onShapeChange(in, inputs, out, outputs);
}
HOST_API int32_t plugin_enqueue(IPluginV3* p, PluginTensorDesc const* in,
                                PluginTensorDesc const* out, void const* const* inputs,
                                void* const* outputs, void* workspace, void* stream) {
  return runtime(p)->enqueue(in, out, inputs, outputs, workspace,
                             static_cast<cudaStream_t>(stream));
}
