// SPDX-License-Identifier: Apache-2.0
// Stand-ins for the libraries that TensorRT's Python bindings link to and no package index has. One file, three libraries: libnvinfer (its
// symbols beyond the lean runtime's), libnvinfer_plugin, libnvonnxparser. Nothing can be built or parsed with them; the bindings
// load, and their plugin registry is the lean runtime's real one.
#include <stdbool.h>
#include <stdint.h>

#if defined(STUB_NVINFER)
extern void* getPluginRegistry(void);
void* createInferBuilder_INTERNAL(void* logger, int32_t version) {
  (void)logger;
  (void)version;
  return 0;
}
void* getBuilderPluginRegistry(int32_t capability) {
  (void)capability;
  return getPluginRegistry();
}
#elif defined(STUB_PLUGIN)
bool initLibNvInferPlugins(void* logger, char const* space) {
  (void)logger;
  (void)space;
  return true;
}
#elif defined(STUB_PARSER)
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int32_t version) {
  (void)network;
  (void)logger;
  (void)version;
  return 0;
}
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int32_t version) {
  (void)refitter;
  (void)logger;
  (void)version;
  return 0;
}
int32_t getNvOnnxParserVersion(void) { return 110400; }
#endif
