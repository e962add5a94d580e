// SPDX-License-Identifier: Apache-2.0
//
// Prints what a caller of TensorRT's plugin interfaces relies on: sizes and offsets of structs,
// values of enumerators, and the index of each virtual function. Compiled with the project's header
// it also prints, for TensorRT 10 and 11 each, the interfaces of host_abi.hpp; compiled with
// NVIDIA's (QR_TENSORRT_HEADERS), NVIDIA's own.
#include <cstdio>
#include <cstring>

#include "tensorrt.hpp"
#ifndef QR_TENSORRT_HEADERS
#include "host_abi.hpp"
#endif

using namespace nvinfer1;

// The Itanium ABI: a pointer to a virtual member function holds 1 + 8 * its index.
template <class Function>
long index(Function function) {
  static_assert(sizeof function == 16, "a pointer to a member function");
  long word;
  memcpy(&word, &function, sizeof word);
  return (word - 1) / 8;
}

#define VIRTUAL(type, function) printf(#type "::" #function " %ld\n", index(&type::function))
#define MEMBER(type, member) printf(#type "." #member " %zu\n", offsetof(type, member))
#define SIZE(type) printf("sizeof " #type " %zu\n", sizeof(type))
#define VALUE(type, value) printf(#type "::" #value " %d\n", static_cast<int>(type::value))

template <class Registry>
void printRegistry() {
  using Register = bool (Registry::*)(IPluginCreatorInterface&, char const*) noexcept;
  using Deregister = bool (Registry::*)(IPluginCreatorInterface const&) noexcept;
  printf("IPluginRegistry::registerCreator %ld\n",
         index(static_cast<Register>(&Registry::registerCreator)));
  printf("IPluginRegistry::getCreator %ld\n", index(&Registry::getCreator));
  printf("IPluginRegistry::deregisterCreator %ld\n",
         index(static_cast<Deregister>(&Registry::deregisterCreator)));
}

template <class Logger, class Finder>
void printLoggers() {
  printf("ILogger::log %ld\n", index(&Logger::log));
  printf("ILoggerFinder::findLogger %ld\n", index(&Finder::findLogger));
}

int main() {
  printf("# plugins\n");
  SIZE(Dims);
  SIZE(DimsExprs);
  SIZE(PluginField);
  SIZE(PluginFieldCollection);
  SIZE(PluginTensorDesc);
  SIZE(DynamicPluginTensorDesc);
  SIZE(InterfaceInfo);
  SIZE(IExprBuilder);
  SIZE(IDimensionExpr);
  MEMBER(Dims, d);
  MEMBER(DimsExprs, d);
  MEMBER(PluginField, data);
  MEMBER(PluginField, type);
  MEMBER(PluginField, length);
  MEMBER(PluginTensorDesc, type);
  MEMBER(PluginTensorDesc, format);
  MEMBER(DynamicPluginTensorDesc, min);
  MEMBER(DynamicPluginTensorDesc, max);
  MEMBER(DynamicPluginTensorDesc, opt);
  VALUE(DataType, kFLOAT);
  VALUE(DataType, kHALF);
  VALUE(DataType, kINT8);
  VALUE(DataType, kINT32);
  VALUE(DataType, kBOOL);
  VALUE(DataType, kBF16);
  VALUE(TensorFormat, kLINEAR);
  VALUE(DimensionOperation, kPROD);
  VALUE(DimensionOperation, kFLOOR_DIV);
  VALUE(DimensionOperation, kCEIL_DIV);
  VALUE(TensorRTPhase, kRUNTIME);
  VALUE(PluginCapabilityType, kCORE);
  VALUE(PluginCapabilityType, kBUILD);
  VALUE(PluginCapabilityType, kRUNTIME);
  VALUE(PluginFieldType, kFLOAT32);
  VALUE(PluginFieldType, kFLOAT64);
  VALUE(PluginFieldType, kINT32);
  VALUE(PluginFieldType, kINT64);
  VIRTUAL(apiv::VDimensionExpr, isConstant);
  VIRTUAL(apiv::VDimensionExpr, getConstantValue);
  VIRTUAL(apiv::VExprBuilder, constant);
  VIRTUAL(apiv::VExprBuilder, operation);
  VIRTUAL(IVersionedInterface, getAPILanguage);
  VIRTUAL(IVersionedInterface, getInterfaceInfo);
  VIRTUAL(IPluginV3, getCapabilityInterface);
  VIRTUAL(IPluginV3, clone);
  VIRTUAL(IPluginV3OneCore, getPluginName);
  VIRTUAL(IPluginV3OneCore, getPluginVersion);
  VIRTUAL(IPluginV3OneCore, getPluginNamespace);
  VIRTUAL(IPluginV3OneBuild, configurePlugin);
  VIRTUAL(IPluginV3OneBuild, getOutputDataTypes);
  VIRTUAL(IPluginV3OneBuild, getOutputShapes);
  VIRTUAL(IPluginV3OneBuild, supportsFormatCombination);
  VIRTUAL(IPluginV3OneBuild, getNbOutputs);
  VIRTUAL(IPluginV3OneBuild, getWorkspaceSize);
  VIRTUAL(IPluginV3OneBuild, getValidTactics);
  VIRTUAL(IPluginV3OneBuild, getNbTactics);
  VIRTUAL(IPluginV3OneBuild, getTimingCacheID);
  VIRTUAL(IPluginV3OneBuild, getFormatCombinationLimit);
  VIRTUAL(IPluginV3OneBuild, getMetadataString);
  VIRTUAL(IPluginV3OneBuildV2, getAliasedInput);
  VIRTUAL(IPluginV3OneRuntime, setTactic);
  VIRTUAL(IPluginV3OneRuntime, onShapeChange);
  VIRTUAL(IPluginV3OneRuntime, enqueue);
  VIRTUAL(IPluginV3OneRuntime, attachToContext);
  VIRTUAL(IPluginV3OneRuntime, getFieldsToSerialize);
  VIRTUAL(IPluginCreatorV3One, createPlugin);
  VIRTUAL(IPluginCreatorV3One, getFieldNames);
  VIRTUAL(IPluginCreatorV3One, getPluginName);
  VIRTUAL(IPluginCreatorV3One, getPluginVersion);
  VIRTUAL(IPluginCreatorV3One, getPluginNamespace);
#ifdef QR_TENSORRT_HEADERS
  printf("# TensorRT %d\n", NV_TENSORRT_MAJOR);
  printRegistry<IPluginRegistry>();
  printLoggers<ILogger, ILoggerFinder>();
#else
  printf("# TensorRT 10\n");
  printRegistry<quarot::trt10::IPluginRegistry>();
  printLoggers<quarot::trt10::ILogger, quarot::trt10::ILoggerFinder>();
  printf("# TensorRT 11\n");
  printRegistry<quarot::trt11::IPluginRegistry>();
  printLoggers<quarot::trt11::ILogger, quarot::trt11::ILoggerFinder>();
#endif
}
