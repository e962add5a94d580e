// SPDX-License-Identifier: Apache-2.0
// Hadamard, HadamardHeads and QuantizeInt4: three forms of qr_transform.
#include "operator_list.hpp"

namespace quarot {
namespace {

using nvinfer1::DimensionOperation;
using nvinfer1::DimsExprs;

constexpr int32_t kPACKED{QR_LAYOUT_ACTIVATIONS_PACKED_V1};
constexpr int32_t kSPLIT{QR_LAYOUT_ACTIVATIONS_SPLIT_V1};

AttributeSpec factorsSpec(bool required) {
  return {"factors", AttributeKind::kINTS, required, 0, {}, 0, 0};
}

class Transform : public Operator {
 public:
  using Operator::Operator;

  void check(Attributes const& attributes) const override {
    std::vector<int32_t> const& factors = value(attributes, "factors").integers;
    qr_hadamard_plan plan;
    int const status =
        qr_make_hadamard_plan(factors.data(), int32_t(factors.size()), 1, nullptr, nullptr, &plan);
    if (status != QR_OK)
      throw Refusal{describe(*this, attributes) + ": " + qr_status_string(status) +
                    "; allowed: powers of two, and up to three multiples of 4 up to 192"};
  }

  void checkShapes(Attributes const& attributes, Call const& call) const override {
    qr_transform_args const args = arguments(attributes, call);
    requireSizes(qr_transform(&args, call.stream), "qr_transform", sizes(args));
  }

  size_t workspaceSize(Attributes const& attributes, Call const& call) const override {
    qr_transform_args const args = arguments(attributes, call);
    return qr_transform_workspace_size(&args);
  }

  void enqueue(Attributes const& attributes, Call const& call) const override {
    qr_transform_args const args = arguments(attributes, call);
    require(qr_transform(&args, call.stream), "qr_transform", sizes(args));
  }

 protected:
  virtual bool acrossHeads(Attributes const& attributes) const = 0;
  virtual void epilogue(Attributes const& attributes, Call const& call,
                        qr_transform_args* args) const = 0;

 private:
  static std::string sizes(qr_transform_args const& args) {
    return "rows=" + std::to_string(args.rows) + ", n=" + std::to_string(args.n);
  }

  qr_transform_args arguments(Attributes const& attributes, Call const& call) const {
    nvinfer1::Dims const& dims = call.in[0].dims;
    requireRank("x", dims, std::max(1, dims.nbDims));
    qr_transform_args args{};
    args.dtype = kernelDtype(call.in[0].type);
    args.n = args.x_stride = dims.d[dims.nbDims - 1];
    args.rows = leading(dims, 1);
    if (call.inputs) args.x = call.inputs[0];
    args.workspace = call.workspace;
    args.workspace_bytes = call.workspaceBytes;

    std::vector<int32_t> const& factors = value(attributes, "factors").integers;
    size_t const words = qr_hadamard_sign_words(factors.data(), int32_t(factors.size()));
    if ((words > 0) != (call.nbInputs == 2))
      throw Refusal{"factors need " + std::to_string(words) + " words of signs, and there are " +
                    std::to_string(call.nbInputs) + " inputs; give signs exactly if there are any"};
    if (words > 0) requireDims("signs", call.in[1].dims, {int64_t(words)});
    if (!factors.empty()) {
      int64_t order = 1;
      for (int32_t const factor : factors) order *= factor;
      int64_t inner = 1;
      if (acrossHeads(attributes)) {
        if (args.n % order)
          throw Refusal{"x is " + text(dims) + ", whose last axis is no multiple of " +
                        std::to_string(order) + " heads; give one that is"};
        inner = args.n / order;
      }
      require(qr_make_hadamard_plan(factors.data(), int32_t(factors.size()), int32_t(inner),
                                    nullptr, nullptr, &args.hadamard),
              "qr_make_hadamard_plan", "inner=" + std::to_string(inner));
    }
    // A plan with dense factors has signs, whose bits nobody looks at while only sizes are known.
    alignas(16) static uint32_t const kNO_SIGNS[4]{};
    if (words > 0)
      args.hadamard.signs = call.inputs ? static_cast<uint32_t const*>(call.inputs[1]) : kNO_SIGNS;
    epilogue(attributes, call, &args);
    return args;
  }
};

class Hadamard : public Transform {
 public:
  Hadamard(char const* name, bool heads)
      : Transform(name,
                  {{"x", Type::kFLOATING, "[..., n]"}, {"signs", Type::kINT32, "[words]", true}},
                  {{"y", Type::kFLOATING, "[..., n]"}}, {factorsSpec(true)}),
        mHeads(heads) {}

  void outputShapes(Attributes const&, DimsExprs const* in, int32_t, DimsExprs* out,
                    nvinfer1::IExprBuilder&) const override {
    requireSymbolicRank("x", in[0], 1);
    out[0] = in[0];
  }

 protected:
  bool acrossHeads(Attributes const&) const override { return mHeads; }

  void epilogue(Attributes const&, Call const& call, qr_transform_args* args) const override {
    args->epilogue = QR_EPILOGUE_STORE;
    if (call.outputs) args->y = call.outputs[0];
  }

 private:
  bool mHeads;
};

class QuantizeInt4 : public Transform {
 public:
  QuantizeInt4()
      : Transform(
            "QuantizeInt4",
            {{"x", Type::kFLOATING, "[..., k]"}, {"signs", Type::kINT32, "[words]", true}},
            {{"q", Type::kINT8, "[..., k/2] or split"}, {"scale", Type::kFLOAT, "[..., 1]"}},
            {{"bits", AttributeKind::kINT, false, 4, {4}, 0, 0},
             {"clip_ratio", AttributeKind::kFLOAT, false, 0.9, {}, 0, 1},
             factorsSpec(false),
             {"heads", AttributeKind::kINT, false, 0, {0, 1}, 0, 0},
             {"activation_layout", AttributeKind::kINT, false, kPACKED, {kPACKED, kSPLIT}, 0, 0}}) {
  }

  void outputShapes(Attributes const& attributes, DimsExprs const* in, int32_t, DimsExprs* out,
                    nvinfer1::IExprBuilder& builder) const override {
    int32_t const rank = requireSymbolicRank("x", in[0], 1);
    auto const& k = *in[0].d[rank - 1];
    out[1] = in[0];
    out[1].d[rank - 1] = builder.constant(1);
    if (value(attributes, "activation_layout").integer == kPACKED) {
      out[0] = in[0];
      out[0].d[rank - 1] =
          builder.operation(DimensionOperation::kFLOOR_DIV, k, *builder.constant(2));
      return;
    }
    auto const* tokens = builder.constant(1);
    for (int32_t i = 0; i < rank - 1; i++)
      tokens = builder.operation(DimensionOperation::kPROD, *tokens, *in[0].d[i]);
    auto const* groups =
        builder.operation(DimensionOperation::kCEIL_DIV, *tokens, *builder.constant(8));
    out[0].nbDims = 3;
    out[0].d[0] = builder.operation(DimensionOperation::kCEIL_DIV, k, *builder.constant(128));
    out[0].d[1] = builder.operation(DimensionOperation::kPROD, *groups, *builder.constant(8));
    out[0].d[2] = builder.constant(128);
  }

 protected:
  bool acrossHeads(Attributes const& attributes) const override {
    return value(attributes, "heads").integer != 0;
  }

  void epilogue(Attributes const& attributes, Call const& call,
                qr_transform_args* args) const override {
    args->epilogue = QR_EPILOGUE_QUANTIZE;
    args->activation_layout = value(attributes, "activation_layout").integer;
    args->clip_ratio = value(attributes, "clip_ratio").real;
    if (!call.outputs) return;
    args->codes = call.outputs[0];
    args->scale = static_cast<float*>(call.outputs[1]);
  }
};

}  // namespace

Operator const& hadamard() {
  static Hadamard const op("Hadamard", false);
  return op;
}

Operator const& hadamardHeads() {
  static Hadamard const op("HadamardHeads", true);
  return op;
}

Operator const& quantizeInt4() {
  static QuantizeInt4 const op;
  return op;
}

}  // namespace quarot
