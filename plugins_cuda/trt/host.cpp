// SPDX-License-Identifier: Apache-2.0
#include "host.hpp"

#include <dlfcn.h>

#include <cstdio>
#include <mutex>
#include <utility>
#include <vector>

#include "host_abi.hpp"

namespace quarot {
namespace {

// One TensorRT library of this process.
struct Host {
  int32_t major;
  void* registry;
  void* (*getLogger)();
};

// Python and Triton load TensorRT with RTLD_LOCAL, where RTLD_DEFAULT does not look: hence by name.
std::vector<Host> loadedHosts() {
  std::vector<Host> hosts;
  auto const add = [&](void* library) {
    auto const version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    auto const registry = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"));
    if (!version || !registry) return;
    // 10.3.0 says 100300; before 10.0 it was 8601 for 8.6.1.
    int32_t const major = version() / 10000;
    void* const found = (major == 10 || major == 11) ? registry() : nullptr;
    if (!found) return;
    for (Host const& host : hosts)
      if (host.registry == found) return;
    hosts.push_back({major, found, reinterpret_cast<void* (*)()>(dlsym(library, "getLogger"))});
  };
  add(RTLD_DEFAULT);
  for (char const* name :
       {"libnvinfer.so.11", "libnvinfer_lean.so.11", "libnvinfer_dispatch.so.11",
        "libnvinfer.so.10", "libnvinfer_lean.so.10", "libnvinfer_dispatch.so.10"})
    if (void* const library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY)) {
      add(library);
      dlclose(library);  // the reference that this dlopen took
    }
  return hosts;
}

struct Registered {
  Host host;
  nvinfer1::IPluginCreatorInterface* creator;
};

std::mutex gMutex;
std::vector<Registered> gRegistered;
void* gFinder{nullptr};
void* gFinderOf11{nullptr};  // where no TensorRT is loaded: a host of our own, by the newer table

int32_t majorOf(std::vector<Host> const& hosts, void* registry) {
  for (Host const& host : hosts)
    if (host.registry == registry) return host.major;
  return hosts.empty() ? 11 : hosts.front().major;
}

// Returns whether the host took it.
bool registerWith(Host const& host, nvinfer1::IPluginCreatorInterface* creator) {
  auto* const known = static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
  char const *name = known->getPluginName(), *version = known->getPluginVersion();
  char const* space = known->getPluginNamespace();
  if (host.major == 10) {
    auto* const registry = static_cast<trt10::IPluginRegistry*>(host.registry);
    return !registry->getCreator(name, version, space) &&
           registry->registerCreator(*creator, space);
  }
  auto* const registry = static_cast<trt11::IPluginRegistry*>(host.registry);
  return !registry->getCreator(name, version, space) && registry->registerCreator(*creator, space);
}

}  // namespace

void log(Severity severity, std::string const& message) noexcept {
  try {
    std::vector<Host> const hosts = loadedHosts();
    void* logger = nullptr;
    int32_t major = 11;
    if (!hosts.empty()) {
      major = hosts.front().major;
      if (gFinder)
        logger = major == 10
                     ? static_cast<void*>(static_cast<trt10::ILoggerFinder*>(gFinder)->findLogger())
                     : static_cast<trt11::ILoggerFinder*>(gFinder)->findLogger();
      if (!logger && hosts.front().getLogger) logger = hosts.front().getLogger();
    } else if (gFinderOf11) {
      logger = static_cast<trt11::ILoggerFinder*>(gFinderOf11)->findLogger();
    }
    if (logger && major == 10)
      static_cast<trt10::ILogger*>(logger)->log(severity, message.c_str());
    else if (logger)
      static_cast<trt11::ILogger*>(logger)->log(severity, message.c_str());
    else if (severity <= Severity::kWARNING)
      fprintf(stderr, "quarot plugins: %s\n", message.c_str());
  } catch (...) {  // a message that cannot be told
  }
}

// A finder belongs to the TensorRT that handed it over: to one in this process, or to a host of our
// own.
void setLoggerFinder(void* finder) noexcept {
  try {
    std::lock_guard<std::mutex> const lock(gMutex);
    (loadedHosts().empty() ? gFinderOf11 : gFinder) = finder;
  } catch (...) {
  }
}

int32_t registerCreators(nvinfer1::IPluginCreatorInterface* const* creators, int32_t count,
                         void* registry) noexcept {
  try {
    std::lock_guard<std::mutex> const lock(gMutex);
    std::vector<Host> hosts = loadedHosts();
    if (registry) hosts = {{majorOf(hosts, registry), registry, nullptr}};
    if (hosts.empty()) return -1;
    int32_t registered = 0;
    for (Host const& host : hosts)
      for (int32_t i = 0; i < count; i++)
        if (registerWith(host, creators[i])) {
          gRegistered.push_back({host, creators[i]});
          registered++;
        }
    return registered;
  } catch (...) {
    return -1;
  }
}

void deregisterCreators() noexcept {
  try {
    std::vector<Registered> taken;
    {
      std::lock_guard<std::mutex> const lock(gMutex);
      taken = std::exchange(gRegistered, {});
    }
    for (Registered const& entry : taken)
      if (entry.host.major == 10)
        static_cast<trt10::IPluginRegistry*>(entry.host.registry)
            ->deregisterCreator(*entry.creator);
      else
        static_cast<trt11::IPluginRegistry*>(entry.host.registry)
            ->deregisterCreator(*entry.creator);
  } catch (...) {
  }
}

}  // namespace quarot
