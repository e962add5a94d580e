// SPDX-License-Identifier: Apache-2.0
// The entry points of libquarot_plugins.so, all that it exports.
//
// Two families of loaders want two protocols. IPluginRegistry::loadLibrary (trtexec
// --dynamicPlugins, engines that carry their plugins) calls getCreators and registers what it
// returns. Everyone who merely dlopens (Polygraphy --plugins, trtexec
// --staticPlugins, Triton, LD_PRELOAD) expects the library to register itself, which the
// constructor below does. Where both happen, loadLibrary would find its creators registered, refuse
// them and unload the library under the registry's pointers: getCreators therefore takes the
// registrations back first, and the library is linked with -z nodelete, so that no pointer to it
// ever dangles.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host.hpp"
#include "plugin.hpp"

#define QR_ENTRY extern "C" __attribute__((visibility("default")))

#ifndef QR_ARCHITECTURES
#error "the build defines QR_ARCHITECTURES, as in \"80 90a\""
#endif

namespace quarot {
namespace {

int32_t registerAll(void* registry) noexcept {
  return registerCreators(creators().data(), static_cast<int32_t>(creators().size()), registry);
}

std::string quoted(std::string const& text) { return "\"" + text + "\""; }

std::string json(TensorSpec const& spec) {
  return "{\"name\": " + quoted(spec.name) + ", \"type\": " + quoted(typeNames(spec.type)) +
         ", \"shape\": " + quoted(spec.shape) +
         ", \"optional\": " + (spec.optional ? "true" : "false") +
         ", \"alias\": " + std::to_string(spec.alias) + "}";
}

std::string json(AttributeSpec const& spec) {
  static char const* const kinds[] = {"int", "float", "ints"};
  char initial[32] = "null";
  if (!spec.required && spec.kind != AttributeKind::kINTS)
    snprintf(initial, sizeof initial, "%.10g", spec.initial);
  return "{\"name\": " + quoted(spec.name) +
         ", \"type\": " + quoted(kinds[static_cast<int>(spec.kind)]) +
         ", \"required\": " + (spec.required ? "true" : "false") + ", \"default\": " + initial +
         ", \"allowed\": " + quoted(spec.allowed()) + "}";
}

template <class Spec>
std::string json(std::vector<Spec> const& specs) {
  std::string out;
  for (Spec const& spec : specs) out += (out.empty() ? "" : ", ") + json(spec);
  return "[" + out + "]";
}

}  // namespace

char const* libraryDescription() {
  static std::string const description = [] {
    std::string plugins;
    for (Operator const* op : operators())
      plugins += (plugins.empty() ? "" : ", ") + quoted(op->name()) +
                 ": {\"inputs\": " + json(op->inputs()) + ", \"outputs\": " + json(op->outputs()) +
                 ", \"attributes\": " + json(op->attributes()) + "}";
    return "{\"abi_version\": " + std::to_string(qr_abi_version()) +
           ", \"backend\": " + quoted(qr_backend()) +
           ", \"architectures\": " + quoted(QR_ARCHITECTURES) +
           ", \"build_id\": " + quoted(QR_BUILD_ID) + ", \"namespace\": " + quoted(kNAMESPACE) +
           ", \"version\": " + quoted(kVERSION) + ", \"plugins\": {" + plugins + "}}";
  }();
  return description.c_str();
}

}  // namespace quarot

// Called by IPluginRegistry::loadLibrary, before getCreators.
QR_ENTRY void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { quarot::setLoggerFinder(finder); }

QR_ENTRY nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
  quarot::deregisterCreators();
  nbCreators = static_cast<int32_t>(quarot::creators().size());
  return quarot::creators().data();
}

// Registers the creators with an IPluginRegistry, or, given null, with every TensorRT loaded in
// this process: for a process that loads TensorRT after this library. The number registered; -1
// where there is no TensorRT.
QR_ENTRY int32_t quarotRegisterPlugins(void* registry) { return quarot::registerAll(registry); }

// What this library is, as JSON; lives as long as the process.
QR_ENTRY char const* quarotDescribePlugins() { return quarot::libraryDescription(); }

namespace {

// QUAROT_PLUGINS_AUTOREGISTER=0 leaves registering to getCreators and quarotRegisterPlugins.
__attribute__((constructor)) void onLoad() {
  char const* const wanted = getenv("QUAROT_PLUGINS_AUTOREGISTER");
  if (!wanted || strcmp(wanted, "0") != 0) quarot::registerAll(nullptr);
}

}  // namespace
