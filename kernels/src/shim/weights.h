// What the autograd functions share whose weights gather gradients in a main gradient (in place, never in `.grad`).
//
// Each takes an `anchor`: a scalar that requires a gradient and receives none. It makes autograd record a node even
// when no activation requires a gradient (the first layer of a model, or of a block), so that the weight still
// receives its own. The main gradient is kept outside save_for_backward on purpose: every backward changes it, and
// the version check would call that an error.
#pragma once
#include <torch/csrc/autograd/custom_function.h>

#include "common.h"

namespace tangelo {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

inline void check_main_grad(const char* op, const Tensor& weight, const std::optional<Tensor>& main_grad) {
  if (!main_grad) return;
  TORCH_CHECK(main_grad->sizes() == weight.sizes(), op, ": main gradient of shape ", main_grad->sizes(),
              " for a weight of shape ", weight.sizes());
  TORCH_CHECK(main_grad->is_contiguous(), op, ": the main gradient must be contiguous");
  TORCH_CHECK(main_grad->scalar_type() == accumulate_type(weight), op, ": main gradient of type ",
              main_grad->scalar_type(), ", expected ", accumulate_type(weight), " for a weight of type ",
              weight.scalar_type());
}

inline void check_weight(const char* op, const Tensor& weight) {
  TORCH_CHECK(!weight.requires_grad(), op,
              ": the weight requires a gradient; pass a main gradient and a detached weight instead");
}

inline bool wants_node(const Tensor& input, bool has_main_grad) {
  return at::GradMode::is_enabled() && (has_main_grad || input.requires_grad());
}

inline Tensor anchor_for(const Tensor& input) {
  return at::zeros({}, input.options().dtype(at::kFloat)).requires_grad_();
}

inline at::IValue saved(const std::optional<Tensor>& tensor) { return tensor ? at::IValue(*tensor) : at::IValue(); }

inline std::optional<Tensor> loaded(AutogradContext* ctx, const char* name) {
  const auto& value = ctx->saved_data[name];
  if (value.isNone()) return std::nullopt;
  return value.toTensor();
}

}  // namespace tangelo
