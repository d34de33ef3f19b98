// RMSNorm, alone and fused with the residual sum before it.
#include "weights.h"

namespace tangelo {
namespace {

// Rows summed together for the weight's gradient: fixed, so that its bits do not depend on the number of threads.
constexpr int64_t GRAD_BLOCK_ROWS = 64;

struct Normed {
  Tensor y, sum, inverse;
};

Normed plain_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  auto sum = residual.defined() ? x + residual : x;
  auto wide = sum.to(accumulate_type(x));
  auto inverse = at::rsqrt(wide.square().mean(-1, true) + eps);
  return {weight * (wide * inverse).to(x.scalar_type()), sum, inverse};
}

Normed forward_of(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  if (!has_kernels(x)) return plain_forward(x, residual, weight, eps);
  auto in = x.contiguous();
  auto other = residual.defined() ? residual.contiguous() : residual;
  auto sum = residual.defined() ? at::empty_like(in) : in;
  auto y = at::empty_like(in);
  const int64_t width = x.size(-1), rows = width == 0 ? 0 : x.numel() / width;
  auto inverse = at::empty({rows}, x.options().dtype(at::kFloat));
  const auto& kernels = kernels_for(x);
  const void* other_data = residual.defined() ? other.const_data_ptr() : nullptr;
  auto scale = weight.contiguous();
  at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    kernels.rms_norm(in.const_data_ptr(), other_data, scale.const_data_ptr(), sum.data_ptr(), y.data_ptr(),
                     inverse.data_ptr<float>(), begin, end, width, static_cast<float>(eps));
  });
  return {y, sum, inverse};
}

Tensor plain_backward(const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight,
                      const Tensor& inverse, const std::optional<Tensor>& main_grad) {
  auto type = accumulate_type(x);
  auto wide = dy.to(type);
  auto normed = x.to(type) * inverse;
  if (main_grad) main_grad->add_(rows_of(wide * normed.to(x.scalar_type()).to(type)).sum(0));
  auto dn = wide * weight.to(type);
  auto dx = inverse * (dn - normed * (dn * normed).mean(-1, true));
  if (dsum.defined()) dx = dx + dsum.to(type);
  return dx.to(x.scalar_type());
}

// The gradient of x (and of the residual: they are the same).
Tensor backward_of(const Tensor& dy_any, const Tensor& dsum_any, const Tensor& x, const Tensor& weight,
                   const Tensor& inverse, const std::optional<Tensor>& main_grad) {
  if (!dy_any.defined()) return dsum_any;
  if (!has_kernels(x)) return plain_backward(dy_any, dsum_any, x, weight, inverse, main_grad);
  auto dy = dy_any.contiguous();
  auto dsum = dsum_any.defined() ? dsum_any.contiguous() : dsum_any;
  auto dx = at::empty_like(x);
  const int64_t width = x.size(-1), rows = inverse.numel();
  const int64_t blocks = (rows + GRAD_BLOCK_ROWS - 1) / GRAD_BLOCK_ROWS;
  auto partial = main_grad ? at::zeros({blocks, width}, inverse.options()) : Tensor();
  const auto& kernels = kernels_for(x);
  const void* dsum_data = dsum.defined() ? dsum.const_data_ptr() : nullptr;
  auto scale = weight.contiguous();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
      float* dweight = main_grad ? partial.data_ptr<float>() + block * width : nullptr;
      const int64_t begin = block * GRAD_BLOCK_ROWS, end = std::min(rows, begin + GRAD_BLOCK_ROWS);
      kernels.rms_norm_backward(dy.const_data_ptr(), dsum_data, x.const_data_ptr(), scale.const_data_ptr(),
                                inverse.const_data_ptr<float>(), dx.data_ptr(), dweight, begin, end, width);
    }
  });
  if (main_grad) {
    cpu::kernels().f32.add_column_sums(partial.const_data_ptr(), blocks, width, main_grad->data_ptr<float>(), 0, width);
  }
  return dx;
}

struct RmsNorm : Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& anchor, const Tensor& x, const Tensor& weight, double eps,
                        const std::optional<Tensor>& main_grad) {
    auto result = forward_of(x, Tensor(), weight, eps);
    ctx->save_for_backward({has_kernels(x) ? x.contiguous() : x, weight, result.inverse});
    ctx->saved_data["main_grad"] = saved(main_grad);
    return result.y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto stored = ctx->get_saved_variables();
    auto dx = backward_of(grads[0], Tensor(), stored[0], stored[1], stored[2], loaded(ctx, "main_grad"));
    return {Tensor(), dx, Tensor(), Tensor(), Tensor()};
  }
};

struct AddRmsNorm : Function<AddRmsNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& anchor, const Tensor& x, const Tensor& residual,
                               const Tensor& weight, double eps, const std::optional<Tensor>& main_grad) {
    auto result = forward_of(x, residual, weight, eps);
    ctx->save_for_backward({result.sum, weight, result.inverse});
    ctx->saved_data["main_grad"] = saved(main_grad);
    ctx->set_materialize_grads(false);
    return {result.y, result.sum};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto stored = ctx->get_saved_variables();
    auto dx = backward_of(grads[0], grads[1], stored[0], stored[1], stored[2], loaded(ctx, "main_grad"));
    return {Tensor(), dx, dx, Tensor(), Tensor(), Tensor()};
  }
};

void check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& main_grad) {
  TORCH_CHECK(weight.dim() == 1 && x.dim() >= 1 && x.size(-1) == weight.size(0), op, ": input of shape ", x.sizes(),
              " does not fit a weight of shape ", weight.sizes());
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), op, ": input of type ", x.scalar_type(), ", weight of type ",
              weight.scalar_type());
  check_weight(op, weight);
  check_main_grad(op, weight, main_grad);
}

}  // namespace
}  // namespace tangelo

extern "C" {

char* tangelo_rms_norm(const at::Tensor* x, const at::Tensor* weight, double eps, const at::Tensor* main_grad_or_null,
                       at::Tensor** out) {
  return tangelo::guarded([&] {
    auto main_grad = tangelo::maybe(main_grad_or_null);
    tangelo::check("rms_norm", *x, *weight, main_grad);
    *out = tangelo::give(tangelo::wants_node(*x, main_grad.has_value())
                             ? tangelo::RmsNorm::apply(tangelo::anchor_for(*x), *x, *weight, eps, main_grad)
                             : tangelo::forward_of(*x, at::Tensor(), *weight, eps).y);
  });
}

char* tangelo_add_rms_norm(const at::Tensor* x, const at::Tensor* residual, const at::Tensor* weight, double eps,
                           const at::Tensor* main_grad_or_null, at::Tensor** out) {
  return tangelo::guarded([&] {
    auto main_grad = tangelo::maybe(main_grad_or_null);
    tangelo::check("add_rms_norm", *x, *weight, main_grad);
    TORCH_CHECK(x->sizes() == residual->sizes() && x->scalar_type() == residual->scalar_type(),
                "add_rms_norm: input of shape ", x->sizes(), " and residual of shape ", residual->sizes());
    const bool node = tangelo::wants_node(*x, main_grad.has_value()) || tangelo::wants_node(*residual, false);
    if (node) {
      auto both = tangelo::AddRmsNorm::apply(tangelo::anchor_for(*x), *x, *residual, *weight, eps, main_grad);
      out[0] = tangelo::give(both[0]);
      out[1] = tangelo::give(both[1]);
    } else {
      auto result = tangelo::forward_of(*x, *residual, *weight, eps);
      out[0] = tangelo::give(result.y);
      out[1] = tangelo::give(result.sum);
    }
  });
}

}  // extern "C"
