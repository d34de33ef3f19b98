// Autograd functions whose weights gather their gradients in a main gradient (fp32, in place) and never in `.grad`:
// linear, embedding and RMSNorm.
//
// Each takes an `anchor`: a scalar that requires a gradient and receives none. It makes autograd record a node even
// when no activation requires a gradient (the first layer of a model, or of a block), so that the weight still
// receives its own. The main gradient is kept outside save_for_backward on purpose: every backward changes it, and
// the version check would call that an error.
#include <torch/csrc/autograd/custom_function.h>

#include "common.h"

namespace tangelo {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

void check_main_grad(const char* op, const Tensor& weight, const std::optional<Tensor>& main_grad) {
  if (!main_grad) return;
  TORCH_CHECK(main_grad->sizes() == weight.sizes(), op, ": main gradient of shape ", main_grad->sizes(),
              " for a weight of shape ", weight.sizes());
  TORCH_CHECK(main_grad->is_contiguous(), op, ": the main gradient must be contiguous");
  TORCH_CHECK(main_grad->scalar_type() == accumulate_type(weight), op, ": main gradient of type ",
              main_grad->scalar_type(), ", expected ", accumulate_type(weight), " for a weight of type ",
              weight.scalar_type());
}

void check_weight(const char* op, const Tensor& weight) {
  TORCH_CHECK(!weight.requires_grad(), op,
              ": the weight requires a gradient; pass a main gradient and a detached weight instead");
}

bool wants_node(const Tensor& input, bool has_main_grad) {
  return at::GradMode::is_enabled() && (has_main_grad || input.requires_grad());
}

Tensor anchor_for(const Tensor& input) {
  return at::zeros({}, input.options().dtype(at::kFloat)).requires_grad_();
}

at::IValue saved(const std::optional<Tensor>& tensor) { return tensor ? at::IValue(*tensor) : at::IValue(); }

std::optional<Tensor> loaded(AutogradContext* ctx, const char* name) {
  const auto& value = ctx->saved_data[name];
  if (value.isNone()) return std::nullopt;
  return value.toTensor();
}

Tensor rows_of(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

// ---- linear --------------------------------------------------------------------------------------------------

void add_weight_grad(Tensor main_grad, const Tensor& dy, const Tensor& x) {
  if (main_grad.scalar_type() == dy.scalar_type()) {
    main_grad.addmm_(dy.t(), x);
  } else {
    main_grad.add_(at::mm(dy.t(), x));
  }
}

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& anchor, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& weight_grad,
                        const std::optional<Tensor>& bias_grad) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["weight_grad"] = saved(weight_grad);
    ctx->saved_data["bias_grad"] = saved(bias_grad);
    return at::linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto stored = ctx->get_saved_variables();
    const Tensor& x = stored[0];
    const Tensor& weight = stored[1];
    auto dy = rows_of(grads[0]);
    Tensor dx;
    if (ctx->needs_input_grad(1)) dx = at::mm(dy, weight).view(x.sizes());
    if (auto main = loaded(ctx, "weight_grad")) add_weight_grad(*main, dy, rows_of(x));
    if (auto main = loaded(ctx, "bias_grad")) main->add_(dy.to(main->scalar_type()).sum(0));
    return {Tensor(), dx, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& weight_grad, const std::optional<Tensor>& bias_grad) {
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "linear: input of shape ", x.sizes(),
              " does not fit a weight of shape ", weight.sizes());
  TORCH_CHECK(weight.is_contiguous(), "linear: the weight must be contiguous (a view of whole rows is)");
  check_weight("linear", weight);
  check_main_grad("linear", weight, weight_grad);
  if (bias) {
    check_weight("linear bias", *bias);
    check_main_grad("linear bias", *bias, bias_grad);
  } else {
    TORCH_CHECK(!bias_grad, "linear: a main gradient for the bias, but no bias");
  }
  if (!wants_node(x, weight_grad || bias_grad)) return at::linear(x, weight, bias);
  return Linear::apply(anchor_for(x), x, weight, bias, weight_grad, bias_grad);
}

// ---- embedding -----------------------------------------------------------------------------------------------

struct Embedding : Function<Embedding> {
  static Tensor forward(AutogradContext* ctx, const Tensor& anchor, const Tensor& ids, const Tensor& table,
                        const Tensor& main_grad) {
    ctx->save_for_backward({ids});
    ctx->saved_data["main_grad"] = main_grad;
    return at::embedding(table, ids);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto ids = ctx->get_saved_variables()[0];
    auto main = ctx->saved_data["main_grad"].toTensor();
    main.index_add_(0, ids.flatten(), rows_of(grads[0]).to(main.scalar_type()));
    return {Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor embedding(const Tensor& ids, const Tensor& table, const std::optional<Tensor>& main_grad) {
  TORCH_CHECK(table.dim() == 2, "embedding: table of shape ", table.sizes(), ", expected [V, D]");
  TORCH_CHECK(ids.scalar_type() == at::kLong, "embedding: ids of type ", ids.scalar_type(), ", expected int64");
  check_weight("embedding", table);
  check_main_grad("embedding", table, main_grad);
  if (!at::GradMode::is_enabled() || !main_grad) return at::embedding(table, ids);
  return Embedding::apply(anchor_for(table), ids, table, *main_grad);
}

// ---- RMSNorm -------------------------------------------------------------------------------------------------

struct RmsNorm : Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& anchor, const Tensor& x, const Tensor& weight, double eps,
                        const std::optional<Tensor>& main_grad) {
    auto wide = x.to(accumulate_type(x));
    auto inverse = at::rsqrt(wide.square().mean(-1, true) + eps);
    ctx->save_for_backward({x, weight, inverse});
    ctx->saved_data["main_grad"] = saved(main_grad);
    return weight * (wide * inverse).to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto stored = ctx->get_saved_variables();
    const Tensor &x = stored[0], &weight = stored[1], &inverse = stored[2];
    auto type = accumulate_type(x);
    auto dy = grads[0].to(type);
    auto normed = x.to(type) * inverse;
    if (auto main = loaded(ctx, "main_grad")) {
      main->add_(rows_of(dy * normed.to(x.scalar_type()).to(type)).sum(0));
    }
    Tensor dx;
    if (ctx->needs_input_grad(1)) {
      auto dn = dy * weight.to(type);
      dx = (inverse * (dn - normed * (dn * normed).mean(-1, true))).to(x.scalar_type());
    }
    return {Tensor(), dx, Tensor(), Tensor(), Tensor()};
  }
};

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& main_grad) {
  TORCH_CHECK(weight.dim() == 1 && x.dim() >= 1 && x.size(-1) == weight.size(0), "rms_norm: input of shape ",
              x.sizes(), " does not fit a weight of shape ", weight.sizes());
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "rms_norm: input of type ", x.scalar_type(),
              ", weight of type ", weight.scalar_type());
  check_weight("rms_norm", weight);
  check_main_grad("rms_norm", weight, main_grad);
  if (wants_node(x, main_grad.has_value())) return RmsNorm::apply(anchor_for(x), x, weight, eps, main_grad);
  auto wide = x.to(accumulate_type(x));
  auto inverse = at::rsqrt(wide.square().mean(-1, true) + eps);
  return weight * (wide * inverse).to(x.scalar_type());
}

}  // namespace tangelo

using tangelo::give;
using tangelo::guarded;
using tangelo::maybe;

extern "C" {

char* tangelo_linear(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias,
                     const at::Tensor* weight_grad, const at::Tensor* bias_grad, at::Tensor** out) {
  return guarded(
      [&] { *out = give(tangelo::linear(*x, *weight, maybe(bias), maybe(weight_grad), maybe(bias_grad))); });
}

char* tangelo_embedding(const at::Tensor* ids, const at::Tensor* table, const at::Tensor* main_grad,
                        at::Tensor** out) {
  return guarded([&] { *out = give(tangelo::embedding(*ids, *table, maybe(main_grad))); });
}

char* tangelo_rms_norm(const at::Tensor* x, const at::Tensor* weight, double eps, const at::Tensor* main_grad,
                       at::Tensor** out) {
  return guarded([&] { *out = give(tangelo::rms_norm(*x, *weight, eps, maybe(main_grad))); });
}

}  // extern "C"
