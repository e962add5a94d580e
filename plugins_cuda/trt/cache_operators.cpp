// SPDX-License-Identifier: Apache-2.0
// KvAppend and KvAttention: the INT4 cache, of fixed capacity and in place.
#include <limits>

#include "operator_list.hpp"

namespace quarot {
namespace {

using nvinfer1::Dims;

// Checks codes [B, H, C, D/2], scale and zero [B, H, C, 1].
void requireCache(char const* name, nvinfer1::PluginTensorDesc const* cache, int64_t batch,
                  int64_t heads, int64_t capacity, int64_t headDim) {
  requireDims(name, cache[0].dims, {batch, heads, capacity, headDim / 2});
  std::string const of(name);
  requireDims((of + "_scale").c_str(), cache[1].dims, {batch, heads, capacity, 1});
  requireDims((of + "_zero").c_str(), cache[2].dims, {batch, heads, capacity, 1});
}

// Of three pointers: codes, scale, zero.
qr_kv_cache cacheOf(void* codes, void* scale, void* zero) {
  return {static_cast<uint8_t*>(codes), static_cast<float*>(scale), static_cast<float*>(zero)};
}

// Sizes go through the kernels' 32-bit arguments.
int32_t small(char const* name, int64_t size) {
  if (size > std::numeric_limits<int32_t>::max())
    throw Refusal{std::string(name) + " = " + std::to_string(size) + "; give less than 2^31"};
  return static_cast<int32_t>(size);
}

class KvAppend : public Operator {
 public:
  KvAppend()
      : Operator("KvAppend",
                 {{"new", Type::kFLOATING, "[B, H, S, D]"},
                  {"past", Type::kINT8, "[B, H, C, D/2]"},
                  {"past_scale", Type::kFLOAT, "[B, H, C, 1]"},
                  {"past_zero", Type::kFLOAT, "[B, H, C, 1]"},
                  {"lengths", Type::kINT32, "[B]"}},
                 {{"present", Type::kINT8, "[B, H, C, D/2]", false, 1},
                  {"present_scale", Type::kFLOAT, "[B, H, C, 1]", false, 2},
                  {"present_zero", Type::kFLOAT, "[B, H, C, 1]", false, 3}},
                 {{"bits", AttributeKind::kINT, false, 4, {4}, 0, 0},
                  {"clip_ratio", AttributeKind::kFLOAT, false, 0.95, {}, 0, 1},
                  {"rotate", AttributeKind::kINT, false, 0, {0, 1}, 0, 0}}) {}

  void outputShapes(Attributes const&, nvinfer1::DimsExprs const* in, int32_t,
                    nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const override {
    for (int32_t i = 0; i < 3; i++) {
      requireSymbolicRank(inputs()[i + 1].name, in[i + 1], 4);
      out[i] = in[i + 1];
    }
  }

  void checkShapes(Attributes const& attributes, Call const& call) const override {
    qr_kv_append_args const args = arguments(attributes, call);
    requireSizes(qr_kv_append(&args, call.stream), "qr_kv_append", sizes(args));
  }

  size_t workspaceSize(Attributes const&, Call const&) const override { return 0; }

  void enqueue(Attributes const& attributes, Call const& call) const override {
    for (int32_t i = 0; i < 3; i++)
      if (call.outputs[i] != call.inputs[i + 1])
        throw Refusal{std::string(outputs()[i].name) + " does not lie in the memory of " +
                      inputs()[i + 1].name +
                      "; build the engine with the preview feature ALIASED_PLUGIN_IO_10_03"};
    qr_kv_append_args const args = arguments(attributes, call);
    require(qr_kv_append(&args, call.stream), "qr_kv_append", sizes(args));
  }

 private:
  static std::string sizes(qr_kv_append_args const& args) {
    return "head_dim=" + std::to_string(args.head_dim) +
           ", capacity=" + std::to_string(args.capacity);
  }

  qr_kv_append_args arguments(Attributes const& attributes, Call const& call) const {
    Dims const &x = call.in[0].dims, &past = call.in[1].dims;
    requireRank("new", x, 4);
    requireRank("past", past, 4);
    int64_t const batch = x.d[0], heads = x.d[1], tokens = x.d[2], headDim = x.d[3];
    requireCache("past", call.in + 1, batch, heads, past.d[2], headDim);
    requireDims("lengths", call.in[4].dims, {batch});
    qr_kv_append_args args{};
    args.dtype = kernelDtype(call.in[0].type);
    args.batch = small("batch", batch);
    args.kv_heads = small("heads", heads);
    args.head_dim = small("head_dim", headDim);
    args.tokens = tokens;
    args.capacity = past.d[2];
    args.strides[0] = heads * tokens * headDim;
    args.strides[1] = tokens * headDim;
    args.strides[2] = headDim;
    args.rotate_k = value(attributes, "rotate").integer;
    args.clip_ratio = value(attributes, "clip_ratio").real;
    if (call.inputs && call.outputs) {
      args.k = call.inputs[0];  // v stays null: a node has one tensor
      args.lengths = static_cast<int32_t const*>(call.inputs[4]);
      args.key = cacheOf(call.outputs[0], call.outputs[1], call.outputs[2]);
    }
    return args;
  }
};

class KvAttention : public Operator {
 public:
  KvAttention()
      : Operator(
            "KvAttention",
            {{"q", Type::kFLOATING, "[B, Hq, S, D]"},
             {"key", Type::kINT8, "[B, H, C, D/2]"},
             {"key_scale", Type::kFLOAT, "[B, H, C, 1]"},
             {"key_zero", Type::kFLOAT, "[B, H, C, 1]"},
             {"value", Type::kINT8, "[B, H, C, D/2]"},
             {"value_scale", Type::kFLOAT, "[B, H, C, 1]"},
             {"value_zero", Type::kFLOAT, "[B, H, C, 1]"},
             {"lengths", Type::kINT32, "[B]"},
             {"mask", Type::kBOOL, "[B, 1, S, M]", true}},
            {{"y", Type::kFLOATING, "[B, S, Hq * D]"}},
            {{"scale", AttributeKind::kFLOAT, true, 0, {}, 0, std::numeric_limits<float>::max()},
             {"rotate", AttributeKind::kINT, false, 0, {0, 1}, 0, 0}}) {}

  void outputShapes(Attributes const&, nvinfer1::DimsExprs const* in, int32_t,
                    nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& builder) const override {
    requireSymbolicRank("q", in[0], 4);
    out[0].nbDims = 3;
    out[0].d[0] = in[0].d[0];
    out[0].d[1] = in[0].d[2];
    out[0].d[2] = builder.operation(nvinfer1::DimensionOperation::kPROD, *in[0].d[1], *in[0].d[3]);
  }

  void checkShapes(Attributes const& attributes, Call const& call) const override {
    qr_kv_attention_args const args = arguments(attributes, call);
    requireSizes(qr_kv_attention(&args, call.stream), "qr_kv_attention", sizes(args));
  }

  size_t workspaceSize(Attributes const& attributes, Call const& call) const override {
    qr_kv_attention_args const args = arguments(attributes, call);
    return qr_kv_attention_workspace_size(&args);
  }

  void enqueue(Attributes const& attributes, Call const& call) const override {
    qr_kv_attention_args const args = arguments(attributes, call);
    require(qr_kv_attention(&args, call.stream), "qr_kv_attention", sizes(args));
  }

 private:
  static std::string sizes(qr_kv_attention_args const& args) {
    return "heads=" + std::to_string(args.heads) + ", kv_heads=" + std::to_string(args.kv_heads) +
           ", head_dim=" + std::to_string(args.head_dim) +
           ", query_tokens=" + std::to_string(args.query_tokens) +
           ", capacity=" + std::to_string(args.capacity) +
           ", length=" + std::to_string(args.max_length);
  }

  qr_kv_attention_args arguments(Attributes const& attributes, Call const& call) const {
    Dims const &q = call.in[0].dims, &key = call.in[1].dims;
    requireRank("q", q, 4);
    requireRank("key", key, 4);
    int64_t const batch = q.d[0], heads = q.d[1], tokens = q.d[2], headDim = q.d[3];
    requireCache("key", call.in + 1, batch, key.d[1], key.d[2], headDim);
    requireCache("value", call.in + 4, batch, key.d[1], key.d[2], headDim);
    requireDims("lengths", call.in[7].dims, {batch});
    qr_kv_attention_args args{};
    args.max_length = key.d[2];
    if (call.nbInputs == 9) {
      requireRank("mask", call.in[8].dims, 4);
      args.max_length = call.in[8].dims.d[3];
      requireDims("mask", call.in[8].dims, {batch, 1, tokens, args.max_length});
    }
    args.dtype = kernelDtype(call.in[0].type);
    args.epilogue = QR_EPILOGUE_STORE;
    args.batch = small("batch", batch);
    args.heads = small("heads", heads);
    args.kv_heads = small("kv_heads", key.d[1]);
    args.head_dim = small("head_dim", headDim);
    args.query_tokens = tokens;
    args.capacity = key.d[2];
    args.strides[0] = heads * tokens * headDim;
    args.strides[1] = tokens * headDim;
    args.strides[2] = headDim;
    args.softmax_scale = value(attributes, "scale").real;
    args.rotate_q = value(attributes, "rotate").integer;
    args.clip_ratio = 1.F;  // of an epilogue that is not used
    if (call.inputs && call.outputs) {
      auto const input = [&](int32_t i) { return const_cast<void*>(call.inputs[i]); };
      args.q = input(0);
      args.key = cacheOf(input(1), input(2), input(3));
      args.value = cacheOf(input(4), input(5), input(6));
      args.lengths = static_cast<int32_t const*>(input(7));
      if (call.nbInputs == 9) args.mask = static_cast<uint8_t const*>(input(8));
      args.y = call.outputs[0];
    }
    args.workspace = call.workspace;
    args.workspace_bytes = call.workspaceBytes;
    return args;
  }
};

}  // namespace

Operator const& kvAppend() {
  static KvAppend const op;
  return op;
}

Operator const& kvAttention() {
  static KvAttention const op;
  return op;
}

std::vector<Operator const*> const& operators() {
  static std::vector<Operator const*> const all{&hadamard(), &hadamardHeads(), &quantizeInt4(),
                                                &int4Gemm(), &kvAppend(),      &kvAttention()};
  return all;
}

}  // namespace quarot
