// Matrix products: forward through kernels of our own, whose rows do not depend on each other, and for gradients
// through the fastest library at hand.
//
// Forward products (cpu/products.inc) are as fast as the library's or faster (docs/LOG.md), for one row or for thousands,
// so training, scoring and generation share them and agree to the bit.
//
// In fp32 at::mm goes through MKL, which is slow on AMD processors (measured: 62 to 98 GFLOP/s a core on Zen 4);
// oneDNN inside the same libtorch reaches 90 to 105. at::native::mkldnn_matmul is exported by libtorch_cpu though in no
// public header; it also adds into its output, which is what a main gradient wants.
#include <vector>

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

// Rows whose operands stay in the second-level cache while the columns pass.
constexpr int64_t ROW_BLOCK = 256;

// Outputs of one piece of work; pieces of few rows are cut so that every thread has the same.
int64_t outputs_at_once(int64_t rows, int64_t outputs) {
  const int64_t threads = at::get_num_threads();
  if (rows > 2 * threads * ROW_BLOCK || at::in_parallel_region()) return outputs;
  const int64_t share = (outputs + threads - 1) / threads;
  return (share + 15) / 16 * 16;
}

// The calling thread's, kept from call to call: a step asks hundreds of times.
float* scratch_of(int64_t floats) {
  constexpr int64_t LINE = 64;
  thread_local std::vector<char> room;
  const size_t bytes = floats * sizeof(float) + LINE;
  if (room.size() < bytes) room.resize(bytes);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + LINE - 1) / LINE * LINE);
}

void linear_kernel(Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  if (rows == 0 || outputs == 0) return;
  const int64_t wide = outputs_at_once(rows, outputs), columns = (outputs + wide - 1) / wide;
  const int64_t units = (rows + ROW_BLOCK - 1) / ROW_BLOCK * columns;
  const int64_t floats = cpu::kernels().linear_scratch(std::min(rows, ROW_BLOCK), inputs);
  const auto& kernels = kernels_for(x);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const void* bias_data = bias.defined() ? bias.const_data_ptr() : nullptr;
  const int64_t grain = rows * inputs * outputs < 32768 ? units : 1;
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    float* scratch = scratch_of(floats);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t row = unit / columns * ROW_BLOCK, first = unit % columns * wide;
      kernels.linear(from + row * inputs * x.element_size(), weight.const_data_ptr(), bias_data,
                     to + row * outputs * x.element_size(), std::min(ROW_BLOCK, rows - row), inputs, outputs, first,
                     std::min(outputs, first + wide), scratch);
    }
  });
}

}  // namespace

void linear_rows(Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (has_kernels(x)) return linear_kernel(out, x, weight, bias);
  at::linear_out(out, x, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
}

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
