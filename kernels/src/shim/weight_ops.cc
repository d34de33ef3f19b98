// Autograd functions whose weights gather their gradients in a main gradient (fp32, in place) and never in `.grad`:
// linear and embedding (RMSNorm lies in norm.cc).
#include "weights.h"

namespace tangelo {

// ---- linear --------------------------------------------------------------------------------------------------

Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!has_kernels(x)) return at::linear(x, weight, bias);
  auto rows = rows_of(x).contiguous();
  auto out = at::empty({rows.size(0), weight.size(0)}, x.options());
  linear_rows(out, rows, weight, bias ? bias->contiguous() : Tensor());
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return out.view(shape);
}

void add_bias_grad(Tensor& main_grad, const Tensor& dy) {
  if (!has_kernels(dy)) {
    main_grad.add_(dy.to(main_grad.scalar_type()).sum(0));
    return;
  }
  kernels_for(dy).add_column_sums(dy.const_data_ptr(), dy.size(0), dy.size(1), main_grad.data_ptr<float>(), 0,
                                  dy.size(1));
}

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& anchor, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& weight_grad,
                        const std::optional<Tensor>& bias_grad) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["weight_grad"] = saved(weight_grad);
    ctx->saved_data["bias_grad"] = saved(bias_grad);
    return linear_forward(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto stored = ctx->get_saved_variables();
    const Tensor& x = stored[0];
    const Tensor& weight = stored[1];
    auto dy = rows_of(grads[0]).contiguous();
    Tensor dx;
    if (ctx->needs_input_grad(1)) {
      dx = at::empty({dy.size(0), weight.size(1)}, dy.options());
      product(dx, dy, weight, false);
      dx = dx.view(x.sizes());
    }
    if (auto main = loaded(ctx, "weight_grad")) add_weight_grad(*main, dy, rows_of(x).contiguous());
    if (auto main = loaded(ctx, "bias_grad")) add_bias_grad(*main, dy);
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
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "linear: input of type ", x.scalar_type(),
              ", weight of type ", weight.scalar_type());
  if (!wants_node(x, weight_grad || bias_grad)) return linear_forward(x, weight, bias);
  return Linear::apply(anchor_for(x), x, weight, bias, weight_grad, bias_grad);
}

// ---- embedding -----------------------------------------------------------------------------------------------

void embedding_backward(const Tensor& ids, const Tensor& dy_any, Tensor& main_grad) {
  auto dy = rows_of(dy_any).contiguous();
  auto rows = ids.flatten().contiguous();
  TORCH_CHECK(rows.scalar_type() == at::kLong, "embedding: ids of type ", ids.scalar_type(), ", expected int64");
  TORCH_CHECK(rows.numel() == dy.size(0) && main_grad.dim() == 2 && main_grad.size(1) == dy.size(1) &&
                  main_grad.is_contiguous(),
              "embedding: ids of shape ", ids.sizes(), " and gradients of shape ", dy_any.sizes(),
              " do not fit a main gradient of shape ", main_grad.sizes());
  if (!has_kernels(dy) || main_grad.scalar_type() != at::kFloat) {
    main_grad.index_add_(0, rows, dy.to(main_grad.scalar_type()));
    return;
  }
  // On one thread: rows repeat, and their order must not depend on how many threads there are.
  kernels_for(dy).add_rows(dy.const_data_ptr(), rows.const_data_ptr<int64_t>(), rows.numel(), dy.size(1),
                           main_grad.data_ptr<float>());
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

// main_grad [V, D] += dy [.., D], each row at its id.
char* tangelo_embedding_backward(const at::Tensor* ids, const at::Tensor* dy, at::Tensor* main_grad) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    tangelo::embedding_backward(*ids, *dy, *main_grad);
  });
}

}  // extern "C"
