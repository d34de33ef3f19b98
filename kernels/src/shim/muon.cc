// Newton-Schulz iterations on the CPU, in fp32 through the fastest products at hand.
#include "common.h"

namespace tangelo {
namespace {

// `x` [r, c], r <= c and contiguous, of norm at most 1.
Tensor iterated(Tensor x, size_t steps, const double* coefficients) {
  const double a = coefficients[0], b = coefficients[1], c = coefficients[2];
  auto gram = at::empty({x.size(0), x.size(0)}, x.options());
  auto update = at::empty_like(gram);
  for (size_t step = 0; step < steps; step++) {
    product(gram, x, x.t(), false);
    product(update, gram, gram, false);
    update.mul_(c).add_(gram, b);
    auto next = x * a;
    product(next, update, x, true);
    x = next;
  }
  return x;
}

}  // namespace
}  // namespace tangelo

extern "C" {

// `coefficients` holds three numbers.
char* tangelo_newton_schulz(const at::Tensor* m, size_t steps, double eps, const double* coefficients,
                            at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    const bool tall = m->size(0) > m->size(1);
    auto x = (tall ? m->t() : *m).to(at::kFloat).contiguous();
    x = x / x.norm().clamp_min(eps);
    x = tangelo::iterated(x, steps, coefficients);
    *out = tangelo::give(tall ? x.t().contiguous() : x);
  });
}

}  // extern "C"
