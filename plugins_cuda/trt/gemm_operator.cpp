// SPDX-License-Identifier: Apache-2.0
// Int4Gemm: qr_gemm on weights in fragment order.
#include "operator_list.hpp"

namespace quarot {
namespace {

constexpr int32_t kPACKED{QR_LAYOUT_ACTIVATIONS_PACKED_V1};
constexpr int32_t kSPLIT{QR_LAYOUT_ACTIVATIONS_SPLIT_V1};
constexpr int32_t kFRAGMENTS{QR_LAYOUT_WEIGHTS_FRAGMENTS_V1};

int64_t ceilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Int4Gemm : public Operator {
 public:
  Int4Gemm()
      : Operator(
            "Int4Gemm",
            {{"q", Type::kINT8, "[..., k/2] or split"},
             {"scale", Type::kFLOAT, "[..., 1]"},
             {"w", Type::kINT8, "[ceil(n/64), 2 ceil(k/128), 4, 32, 16]"},
             {"w_scale", Type::kFLOAT, "[n]"},
             {"bias", Type::kFLOAT, "[n]", true}},
            {{"y", Type::kCHOSEN, "[..., n]"}},
            {{"dtype", AttributeKind::kINT, true, 0, {10, 16}, 0, 0},
             {"weight_layout", AttributeKind::kINT, true, 0, {kFRAGMENTS}, 0, 0},
             {"activation_layout", AttributeKind::kINT, false, kPACKED, {kPACKED, kSPLIT}, 0, 0}}) {
  }

  void outputShapes(Attributes const&, nvinfer1::DimsExprs const* in, int32_t,
                    nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const override {
    int32_t const rank = requireSymbolicRank("scale", in[1], 1);
    requireSymbolicRank("w_scale", in[3], 1);
    out[0] = in[1];
    out[0].d[rank - 1] = in[3].d[0];
  }

  void checkShapes(Attributes const& attributes, Call const& call) const override {
    qr_gemm_args const args = arguments(attributes, call);
    requireSizes(qr_gemm(&args, call.stream), "qr_gemm", sizes(args));
  }

  size_t workspaceSize(Attributes const& attributes, Call const& call) const override {
    qr_gemm_args const args = arguments(attributes, call);
    return qr_gemm_workspace_size(&args);
  }

  // The workspace is TensorRT's, which other layers write to as well: it is cleared every time.
  void enqueue(Attributes const& attributes, Call const& call) const override {
    qr_gemm_args const args = arguments(attributes, call);
    require(qr_gemm_workspace_init(args.workspace, args.workspace_bytes, call.stream),
            "qr_gemm_workspace_init", std::to_string(args.workspace_bytes) + " bytes");
    require(qr_gemm(&args, call.stream), "qr_gemm", sizes(args));
  }

 private:
  static std::string sizes(qr_gemm_args const& args) {
    return "m=" + std::to_string(args.m) + ", n=" + std::to_string(args.n) +
           ", k=" + std::to_string(args.k);
  }

  qr_gemm_args arguments(Attributes const& attributes, Call const& call) const {
    nvinfer1::Dims const &q = call.in[0].dims, &scale = call.in[1].dims;
    requireRank("q", q, std::max(1, q.nbDims));
    requireRank("scale", scale, std::max(1, scale.nbDims));
    requireRank("w_scale", call.in[3].dims, 1);
    qr_gemm_args args{};
    args.kernel = QR_GEMM_AUTO;
    args.out_dtype = value(attributes, "dtype").integer == 10 ? QR_DTYPE_FP16 : QR_DTYPE_BF16;
    args.activation_layout = value(attributes, "activation_layout").integer;
    args.weight_layout = value(attributes, "weight_layout").integer;
    args.m = leading(scale, 1);
    args.n = args.y_stride = call.in[3].dims.d[0];

    std::vector<int64_t> tokens(scale.d, scale.d + scale.nbDims);
    tokens.back() = 1;
    requireDims("scale", scale, tokens);
    if (args.activation_layout == kPACKED) {
      args.k = 2 * q.d[q.nbDims - 1];
      tokens.back() = args.k / 2;
      requireDims("q", q, tokens);
    } else {
      requireRank("q", q, 3);
      args.k = 128 * q.d[0];
      requireDims("q", q, {args.k / 128, 8 * ceilDiv(args.m, 8), 128});
    }
    requireDims("w", call.in[2].dims, {ceilDiv(args.n, 64), 2 * ceilDiv(args.k, 128), 4, 32, 16});
    if (call.nbInputs == 5) requireDims("bias", call.in[4].dims, {args.n});

    if (call.inputs && call.outputs) {
      args.q = call.inputs[0];
      args.scale = static_cast<float const*>(call.inputs[1]);
      args.w = call.inputs[2];
      args.w_scale = static_cast<float const*>(call.inputs[3]);
      if (call.nbInputs == 5) args.bias = static_cast<float const*>(call.inputs[4]);
      args.y = call.outputs[0];
    }
    args.workspace = call.workspace;
    args.workspace_bytes = call.workspaceBytes;
    return args;
  }
};

}  // namespace

Operator const& int4Gemm() {
  static Int4Gemm const op;
  return op;
}

}  // namespace quarot
