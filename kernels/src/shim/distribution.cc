// The head's distribution over the vocabulary, where this rank holds some rows of the head (or all), on the CPU; one chunk
// of tokens, no graph. Rows of logits are memory that threads share out; a row's results depend on that row alone.
#include "common.h"

namespace tangelo {
namespace {

// Of a token: the largest logit, the sum of exp(logit - largest), that of exp(..)(logit - largest), the target's logit.
constexpr int64_t STATS = 4;
// Of a token, for its gradient: see cpu/distribution.inc.
constexpr int64_t ROW = 5;

// The target's row of a head that holds rows [start, start + rows), or -1 where another rank has it.
int64_t held_row(int64_t target, int64_t start, int64_t rows) {
  return target >= start && target - start < rows ? target - start : -1;
}

Tensor stats_of(const Tensor& logits, const Tensor& targets, int64_t start, float inverse_temperature) {
  const int64_t tokens = logits.size(0), rows = logits.size(1), row_bytes = rows * logits.element_size();
  auto stats = at::empty({tokens, STATS}, at::kFloat);
  const char* data = static_cast<const char*>(logits.const_data_ptr());
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  float* to = stats.data_ptr<float>();
  const auto& kernels = kernels_for(logits);
  at::parallel_for(0, tokens, grain_rows(rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      kernels.distribution_row(data + i * row_bytes, rows, held_row(ids[i], start, rows), inverse_temperature,
                               to + STATS * i);
    }
  });
  return stats;
}

void to_gradients(Tensor& logits, const Tensor& targets, int64_t start, float inverse_temperature,
                  const Tensor& rows_of_tokens) {
  const int64_t tokens = logits.size(0), rows = logits.size(1), row_bytes = rows * logits.element_size();
  char* data = static_cast<char*>(logits.data_ptr());
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const float* row = rows_of_tokens.const_data_ptr<float>();
  const auto& kernels = kernels_for(logits);
  at::parallel_for(0, tokens, grain_rows(rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      kernels.distribution_gradient_row(data + i * row_bytes, rows, held_row(ids[i], start, rows), inverse_temperature,
                                        row + ROW * i);
    }
  });
}

}  // namespace
}  // namespace tangelo

extern "C" {

// The caller checks types and shapes.
char* tangelo_distribution(const at::Tensor* hidden, const at::Tensor* head, const at::Tensor* targets, int64_t start,
                           double inverse_temperature, at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    auto logits = at::empty({hidden->size(0), head->size(0)}, hidden->options());
    if (logits.numel() > 0) tangelo::linear_rows(logits, hidden->contiguous(), *head, at::Tensor());
    auto stats =
        tangelo::stats_of(logits, targets->contiguous(), start, static_cast<float>(inverse_temperature));
    out[0] = tangelo::give(logits);
    out[1] = tangelo::give(stats);
  });
}

// The logits become their gradients. `main_grad` may be null.
char* tangelo_distribution_gradients(const at::Tensor* logits, const at::Tensor* hidden, const at::Tensor* head,
                                     const at::Tensor* targets, int64_t start, double inverse_temperature,
                                     const at::Tensor* rows, const at::Tensor* main_grad, at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    auto gradients = *logits, states = hidden->contiguous();
    TORCH_CHECK(gradients.is_contiguous() && rows->is_contiguous(), "distribution: logits and rows must be contiguous");
    // With no tokens or no rows of the head, both gradients are zero.
    if (gradients.numel() == 0) {
      *out = tangelo::give(at::zeros_like(states));
      return;
    }
    tangelo::to_gradients(gradients, targets->contiguous(), start, static_cast<float>(inverse_temperature), *rows);
    auto dhidden = at::empty_like(states);
    tangelo::product(dhidden, gradients, *head, false);
    auto grad = tangelo::maybe(main_grad);
    if (grad) tangelo::add_weight_grad(*grad, gradients, states);
    *out = tangelo::give(dhidden);
  });
}

}  // extern "C"
