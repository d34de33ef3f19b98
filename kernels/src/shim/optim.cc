// AdamW and reductions over flat buffers on the CPU.
#include <cmath>

#include "common.h"

namespace tangelo {
namespace {

constexpr int64_t GRAIN = 1 << 15;

void check_buffer(const char* name, const Tensor& buffer, int64_t length) {
  TORCH_CHECK(buffer.is_cpu() && buffer.is_contiguous() && buffer.scalar_type() == at::kFloat &&
                  buffer.numel() == length,
              "adamw: ", name, " must be a contiguous float32 buffer of ", length, " elements, found ",
              buffer.scalar_type(), " of shape ", buffer.sizes());
}

}  // namespace
}  // namespace tangelo

extern "C" {

struct AdamWArguments {
  double lr, beta1, beta2, eps, weight_decay, step, grad_scale;
};

// Elements [begin, end) of the buffers; `copy` may be null.
char* tangelo_adamw(const at::Tensor* master, const at::Tensor* exp_avg, const at::Tensor* exp_avg_sq,
                    const at::Tensor* grad, const at::Tensor* copy, int64_t begin, int64_t end,
                    const AdamWArguments* a) {
  using namespace tangelo;
  return guarded([&] {
    const int64_t length = master->numel();
    check_buffer("master", *master, length);
    check_buffer("exp_avg", *exp_avg, length);
    check_buffer("exp_avg_sq", *exp_avg_sq, length);
    check_buffer("grad", *grad, length);
    TORCH_CHECK(0 <= begin && begin <= end && end <= length, "adamw: elements ", begin, " to ", end, " of ", length);
    TORCH_CHECK(copy == nullptr || (copy->is_contiguous() && copy->numel() == length && has_kernels(*copy)),
                "adamw: the model's copy must be a contiguous buffer of ", length, " elements in float32 or bfloat16");
    const cpu::AdamWScalars scalars = {
        static_cast<float>(1.0 - a->lr * a->weight_decay),
        static_cast<float>(a->beta1),
        static_cast<float>(1.0 - a->beta1),
        static_cast<float>(a->beta2),
        static_cast<float>(1.0 - a->beta2),
        static_cast<float>(a->lr / (1.0 - std::pow(a->beta1, a->step))),
        static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(a->beta2, a->step))),
        static_cast<float>(a->eps),
        static_cast<float>(a->grad_scale),
    };
    void* copy_data = copy == nullptr ? nullptr : copy->data_ptr();
    const bool copy_is_bf16 = copy != nullptr && copy->scalar_type() == at::kBFloat16;
    at::parallel_for(begin, end, GRAIN, [&](int64_t first, int64_t last) {
      cpu::kernels().adamw(master->data_ptr<float>(), exp_avg->data_ptr<float>(), exp_avg_sq->data_ptr<float>(),
                           grad->const_data_ptr<float>(), copy_data, copy_is_bf16, scalars, first, last);
    });
  });
}

// `sums` has room for one number per chunk.
char* tangelo_chunk_square_sums(const at::Tensor* flat, int64_t chunk, double* sums) {
  return tangelo::guarded([&] {
    const int64_t length = flat->numel(), chunks = (length + chunk - 1) / chunk;
    const float* data = flat->const_data_ptr<float>();
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        sums[i] = tangelo::cpu::kernels().square_sum(data + i * chunk, std::min(chunk, length - i * chunk));
      }
    });
  });
}

// The name of the instruction set in use: a static string.
const char* tangelo_cpu_kernels_name() { return tangelo::cpu::kernels().name; }

}  // extern "C"
