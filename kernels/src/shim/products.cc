// Matrix products through the fastest library at hand.
//
// In fp32 at::mm goes through MKL, which is slow on AMD processors (measured: 62 to 98 GFLOP/s a core on Zen 4);
// oneDNN inside the same libtorch reaches 90 to 105. at::native::mkldnn_matmul is exported by libtorch_cpu though in no
// public header; it also adds into its output, which is what a main gradient wants.
#include "common.h"

namespace at::native {
void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
}

namespace tangelo {
namespace {

// Some builds of libtorch lack oneDNN, or refuse fp32: one small product tells.
bool try_onednn() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  try {
    auto a = at::ones({8, 4}), b = at::ones({4, 8}), out = at::ones({8, 8});
    at::native::mkldnn_matmul(a, b, out, 1.0f, 1.0f);
    return at::equal(out, at::full({8, 8}, 5.0));
  } catch (const std::exception&) {
    return false;
  }
}

bool onednn_takes(const Tensor& out, const Tensor& a, const Tensor& b) {
  static const bool works = try_onednn();
  return works && out.is_cpu() && out.scalar_type() == at::kFloat && a.scalar_type() == at::kFloat &&
         b.scalar_type() == at::kFloat && out.is_contiguous() && out.numel() > 0 && a.size(1) > 0;
}

}  // namespace

void product(Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (onednn_takes(out, a, b)) {
    at::native::mkldnn_matmul(a, b, out, add ? 1.0f : 0.0f, 1.0f);
  } else if (add) {
    out.addmm_(a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

void add_weight_grad(Tensor& main_grad, const Tensor& dy, const Tensor& x) {
  if (main_grad.scalar_type() == dy.scalar_type()) return product(main_grad, dy.t(), x, true);
  auto grad = at::mm(dy.t(), x);
  if (!has_kernels(grad)) {
    main_grad.add_(grad);
    return;
  }
  const auto& kernels = kernels_for(grad);
  float* to = main_grad.data_ptr<float>();
  at::parallel_for(0, grad.numel(), 1 << 16,
                   [&](int64_t begin, int64_t end) { kernels.add_to(grad.const_data_ptr(), to, begin, end); });
}

}  // namespace tangelo
