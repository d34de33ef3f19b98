// The vocabulary head with its cross-entropy where this rank holds some rows of the head, on the CPU; one chunk of
// tokens, no graph. Logits are rows of memory that threads share out; a row's results depend on that row alone.
#include "common.h"

namespace tangelo {
namespace {

// The target's row of a head that holds rows [start, start + rows), or -1 where another rank has it.
int64_t row_of(int64_t target, int64_t start, int64_t rows) {
  return target >= start && target - start < rows ? target - start : -1;
}

// The head's gradient needs the hidden states, the hidden gradient the head: with no tokens or no rows both are zero.
bool has_logits(const Tensor& logits) { return logits.numel() > 0; }

Tensor stats_of(const Tensor& logits, const Tensor& targets, int64_t start) {
  const int64_t tokens = logits.size(0), rows = logits.size(1), row_bytes = rows * logits.element_size();
  auto stats = at::empty({tokens, 3}, at::kFloat);
  const char* data = static_cast<const char*>(logits.const_data_ptr());
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  float* to = stats.data_ptr<float>();
  const auto& kernels = kernels_for(logits);
  at::parallel_for(0, tokens, grain_rows(rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      kernels.softmax_stats_row(data + i * row_bytes, rows, row_of(ids[i], start, rows), to + 3 * i);
    }
  });
  return stats;
}

void to_gradients(Tensor& logits, const Tensor& targets, int64_t start, const Tensor& lse, const Tensor& scales) {
  const int64_t tokens = logits.size(0), rows = logits.size(1), row_bytes = rows * logits.element_size();
  char* data = static_cast<char*>(logits.data_ptr());
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const float *lses = lse.const_data_ptr<float>(), *scale = scales.const_data_ptr<float>();
  const auto& kernels = kernels_for(logits);
  at::parallel_for(0, tokens, grain_rows(rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      kernels.softmax_gradient_row(data + i * row_bytes, rows, row_of(ids[i], start, rows), lses[i], scale[i]);
    }
  });
}

}  // namespace
}  // namespace tangelo

extern "C" {

// The caller checks types and shapes.
char* tangelo_local_logits(const at::Tensor* hidden, const at::Tensor* head, const at::Tensor* targets, int64_t start,
                           at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    auto logits = at::empty({hidden->size(0), head->size(0)}, hidden->options());
    if (tangelo::has_logits(logits)) tangelo::linear_rows(logits, hidden->contiguous(), *head, at::Tensor());
    auto stats = tangelo::stats_of(logits, targets->contiguous(), start);
    out[0] = tangelo::give(logits);
    out[1] = tangelo::give(stats);
  });
}

// The logits become their gradients. `main_grad` may be null.
char* tangelo_chunk_gradients(const at::Tensor* logits, const at::Tensor* hidden, const at::Tensor* head,
                              const at::Tensor* targets, int64_t start, const at::Tensor* lse,
                              const at::Tensor* scales, const at::Tensor* main_grad, at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    auto gradients = *logits, states = hidden->contiguous();
    TORCH_CHECK(gradients.is_contiguous(), "cross_entropy: logits must be contiguous");
    if (!tangelo::has_logits(gradients)) {
      *out = tangelo::give(at::zeros_like(states));
      return;
    }
    tangelo::to_gradients(gradients, targets->contiguous(), start, lse->contiguous(), scales->contiguous());
    auto dhidden = at::empty_like(states);
    tangelo::product(dhidden, gradients, *head, false);
    auto grad = tangelo::maybe(main_grad);
    if (grad) tangelo::add_weight_grad(*grad, gradients, states);
    *out = tangelo::give(dhidden);
  });
}

}  // extern "C"
