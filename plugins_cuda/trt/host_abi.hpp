// SPDX-License-Identifier: Apache-2.0
// The interfaces of TensorRT's that the plugins call and that differ between TensorRT 10 and 11:
// loggers and the registry. Both versions' tables stand here whatever headers the build has, since
// one library serves both; NVIDIA's headers of one version could not state the other's.
// tests/plugins/abi_report.cpp compares them with NVIDIA's.
#pragma once

#include "host.hpp"

namespace quarot {

// Virtual functions in order; `int` stands for one that is not called from here. Destructors take
// two entries. Not in an unnamed namespace: the compiler would conclude that nothing implements
// them.
namespace trt10 {

struct ILogger {
  virtual void log(Severity, char const*) noexcept = 0;
};
struct ILoggerFinder {
  virtual ILogger* findLogger() = 0;
};
struct IPluginRegistry {
  virtual int registerCreatorV2() noexcept = 0;
  virtual int getPluginCreatorList() noexcept = 0;
  virtual int getPluginCreator() noexcept = 0;
  virtual int destroy() noexcept = 0;
  virtual int destroyAndDelete() noexcept = 0;
  virtual int setErrorRecorder() noexcept = 0;
  virtual int getErrorRecorder() noexcept = 0;
  virtual int deregisterCreatorV2() noexcept = 0;
  virtual int isParentSearchEnabled() = 0;
  virtual int setParentSearchEnabled() = 0;
  virtual int loadLibrary() noexcept = 0;
  virtual int deregisterLibrary() noexcept = 0;
  virtual bool registerCreator(nvinfer1::IPluginCreatorInterface&, char const*) noexcept = 0;
  virtual int getAllCreators() noexcept = 0;
  virtual nvinfer1::IPluginCreatorInterface* getCreator(char const*, char const*,
                                                        char const*) noexcept = 0;
  virtual bool deregisterCreator(nvinfer1::IPluginCreatorInterface const&) noexcept = 0;
};

}  // namespace trt10

namespace trt11 {

struct ILogger {
  virtual int getAPILanguage() const noexcept = 0;
  virtual int getInterfaceInfo() const noexcept = 0;
  virtual int destroy() noexcept = 0;
  virtual int destroyAndDelete() noexcept = 0;
  virtual void log(Severity, char const*) noexcept = 0;
};
struct ILoggerFinder {
  virtual int getAPILanguage() const noexcept = 0;
  virtual int getInterfaceInfo() const noexcept = 0;
  virtual int destroy() noexcept = 0;
  virtual int destroyAndDelete() noexcept = 0;
  virtual ILogger* findLogger() = 0;
};
struct IPluginRegistry {
  virtual int destroy() noexcept = 0;
  virtual int destroyAndDelete() noexcept = 0;
  virtual int setErrorRecorder() noexcept = 0;
  virtual int getErrorRecorder() noexcept = 0;
  virtual int isParentSearchEnabled() = 0;
  virtual int setParentSearchEnabled() = 0;
  virtual int loadLibrary() noexcept = 0;
  virtual int deregisterLibrary() noexcept = 0;
  virtual bool registerCreator(nvinfer1::IPluginCreatorInterface&, char const*) noexcept = 0;
  virtual int getAllCreators() noexcept = 0;
  virtual nvinfer1::IPluginCreatorInterface* getCreator(char const*, char const*,
                                                        char const*) noexcept = 0;
  virtual bool deregisterCreator(nvinfer1::IPluginCreatorInterface const&) noexcept = 0;
};

}  // namespace trt11

}  // namespace quarot
