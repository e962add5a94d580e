// SPDX-License-Identifier: Apache-2.0
// A process's TensorRT as the plugins see it: versions, a registry, a logger, of TensorRT
// FAKE_MAJOR. For what the lean runtime does without a GPU never do: hand out a logger.
#include <cstring>
#include <string>
#include <vector>

#include "host_abi.hpp"

#define FAKE_API extern "C" __attribute__((visibility("default")))
#define UNUSED(name) \
  int name() noexcept override { return 0; }

#if FAKE_MAJOR == 10
namespace trt = quarot::trt10;
#else
namespace trt = quarot::trt11;
#endif

namespace {

std::string gLog;
std::vector<nvinfer1::IPluginCreatorV3One*> gCreators;

struct Logger : trt::ILogger {
#if FAKE_MAJOR == 11
  int getAPILanguage() const noexcept override { return 0; }
  int getInterfaceInfo() const noexcept override { return 0; }
  UNUSED(destroy)
  UNUSED(destroyAndDelete)
#endif
  void log(quarot::Severity severity, char const* message) noexcept override {
    gLog += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
  }
} gLogger;

struct Finder : trt::ILoggerFinder {
#if FAKE_MAJOR == 11
  int getAPILanguage() const noexcept override { return 0; }
  int getInterfaceInfo() const noexcept override { return 0; }
  UNUSED(destroy)
  UNUSED(destroyAndDelete)
#endif
  trt::ILogger* findLogger() override { return &gLogger; }
} gFinder;

struct Registry : trt::IPluginRegistry {
#if FAKE_MAJOR == 10
  UNUSED(registerCreatorV2)
  UNUSED(getPluginCreatorList)
  UNUSED(getPluginCreator)
  UNUSED(deregisterCreatorV2)
#endif
  UNUSED(destroy)
  UNUSED(destroyAndDelete)
  UNUSED(setErrorRecorder)
  UNUSED(getErrorRecorder)
  UNUSED(isParentSearchEnabled)
  UNUSED(setParentSearchEnabled)
  UNUSED(loadLibrary)
  UNUSED(deregisterLibrary)
  UNUSED(getAllCreators)
  bool registerCreator(nvinfer1::IPluginCreatorInterface& creator,
                       char const* space) noexcept override {
    if (strcmp(space, "quarot") != 0) return false;
    gCreators.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(&creator));
    return true;
  }
  nvinfer1::IPluginCreatorInterface* getCreator(char const* name, char const* version,
                                                char const* space) noexcept override {
    for (auto* creator : gCreators)
      if (strcmp(creator->getPluginName(), name) == 0 && strcmp(version, "1") == 0 &&
          strcmp(space, "quarot") == 0)
        return creator;
    return nullptr;
  }
  bool deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept override {
    for (size_t i = 0; i < gCreators.size(); i++)
      if (gCreators[i] == &creator) {
        gCreators.erase(gCreators.begin() + static_cast<long>(i));
        return true;
      }
    return false;
  }
} gRegistry;

}  // namespace

FAKE_API int32_t getInferLibVersion() { return FAKE_MAJOR * 10000 + 300; }
FAKE_API void* getPluginRegistry() { return static_cast<trt::IPluginRegistry*>(&gRegistry); }
FAKE_API void* getLogger() { return static_cast<trt::ILogger*>(&gLogger); }

FAKE_API void* fakeFinder() { return static_cast<trt::ILoggerFinder*>(&gFinder); }
FAKE_API int32_t fakeCreators() { return static_cast<int32_t>(gCreators.size()); }
FAKE_API char const* fakeLog() { return gLog.c_str(); }
// Makes QuantizeInt4 with bits = 3, which is refused with a line in the log.
FAKE_API void* fakeCreate() {
  int32_t const bits = 3;
  nvinfer1::PluginField const field("bits", &bits, nvinfer1::PluginFieldType::kINT32, 1);
  nvinfer1::PluginFieldCollection const fields{1, &field};
  for (auto* creator : gCreators)
    if (strcmp(creator->getPluginName(), "QuantizeInt4") == 0)
      return creator->createPlugin("q", &fields, nvinfer1::TensorRTPhase::kBUILD);
  return nullptr;
}
