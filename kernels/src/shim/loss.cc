// The vocabulary head with its cross-entropy on the CPU, chunk by chunk; no graph.
#include <vector>

#include "common.h"

namespace tangelo {
namespace {

// Logits of rows [start, start + count) of `hidden`, into the first rows of `buffer`.
Tensor logits_of(const Tensor& hidden, const Tensor& head, int64_t start, int64_t count, Tensor& buffer) {
  auto logits = buffer.narrow(0, 0, count);
  linear_rows(logits, hidden.narrow(0, start, count), head, Tensor());
  return logits;
}

// Losses of a chunk's rows, into `losses`; with `scales` (one per row) the logits become their gradients.
void rows_of_chunk(Tensor& logits, const int64_t* targets, const float* scales, double* losses) {
  const int64_t width = logits.size(1);
  const auto& kernels = kernels_for(logits);
  const int64_t row_bytes = width * logits.element_size();
  char* data = static_cast<char*>(logits.data_ptr());
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    auto scratch = scales == nullptr ? Tensor() : at::empty({width}, at::kFloat);
    float* room = scales == nullptr ? nullptr : scratch.data_ptr<float>();
    for (int64_t row = begin; row < end; row++) {
      losses[row] = kernels.cross_entropy_row(data + row * row_bytes, width, targets[row],
                                              scales == nullptr ? 0.0f : scales[row], room);
    }
  });
}

void check(const Tensor& hidden, const Tensor& head, const Tensor& targets, int64_t chunk) {
  TORCH_CHECK(hidden.dim() == 2 && head.dim() == 2 && hidden.size(1) == head.size(1),
              "cross_entropy: hidden states of shape ", hidden.sizes(), " do not fit a head of shape ", head.sizes());
  TORCH_CHECK(hidden.scalar_type() == head.scalar_type(), "cross_entropy: hidden states of type ",
              hidden.scalar_type(), ", head of type ", head.scalar_type());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == hidden.size(0) && targets.scalar_type() == at::kLong,
              "cross_entropy: targets of shape ", targets.sizes(), " and type ", targets.scalar_type(),
              ", expected int64 [", hidden.size(0), "]");
  TORCH_CHECK(chunk > 0, "cross_entropy: chunk_tokens must be positive, found ", chunk);
}

void check_range(const Tensor& targets, int64_t vocabulary) {
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); i++) {
    TORCH_CHECK(ids[i] >= 0 && ids[i] < vocabulary, "cross_entropy: target ", ids[i], " at weighted token ", i,
                " is outside the vocabulary of ", vocabulary);
  }
}

// The tokens whose weight is not zero; `rows` stays undefined when that is all of them.
struct Weighted {
  Tensor hidden, targets, weights, rows;
};

Weighted weighted_tokens(const Tensor& hidden, const Tensor& targets, const Tensor& weights) {
  TORCH_CHECK(weights.dim() == 1 && weights.size(0) == hidden.size(0) && weights.scalar_type() == at::kFloat,
              "cross_entropy: weights of shape ", weights.sizes(), " and type ", weights.scalar_type(),
              ", expected float32 [", hidden.size(0), "]");
  auto rows = at::nonzero(weights).squeeze(1);
  if (rows.size(0) == hidden.size(0)) return {hidden.contiguous(), targets.contiguous(), weights.contiguous(), Tensor()};
  return {hidden.index_select(0, rows), targets.index_select(0, rows), weights.index_select(0, rows), rows};
}

struct WithGradients {
  Tensor loss_sum, dhidden;
};

WithGradients with_gradients(const Tensor& hidden, const Tensor& head, const Tensor& targets, const Tensor& weights,
                             double inverse_total_weight, std::optional<Tensor> main_grad, int64_t chunk) {
  auto tokens = weighted_tokens(hidden, targets, weights);
  check_range(tokens.targets, head.size(0));
  const int64_t count = tokens.hidden.size(0);
  auto buffer = at::empty({std::min(chunk, count), head.size(0)}, hidden.options());
  auto dhidden = at::empty_like(tokens.hidden);
  std::vector<double> losses(count);
  std::vector<float> scales(count);
  const float* weight = tokens.weights.const_data_ptr<float>();
  for (int64_t i = 0; i < count; i++) scales[i] = static_cast<float>(weight[i] * inverse_total_weight);
  for (int64_t start = 0; start < count; start += chunk) {
    const int64_t length = std::min(chunk, count - start);
    auto logits = logits_of(tokens.hidden, head, start, length, buffer);
    rows_of_chunk(logits, tokens.targets.const_data_ptr<int64_t>() + start, scales.data() + start,
                  losses.data() + start);
    auto part = dhidden.narrow(0, start, length);
    product(part, logits, head, false);
    if (main_grad) add_weight_grad(*main_grad, logits, tokens.hidden.narrow(0, start, length));
  }
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += weight[i] * losses[i];
  if (tokens.rows.defined()) dhidden = at::zeros_like(hidden).index_copy_(0, tokens.rows, dhidden);
  return {at::full({}, sum, at::kDouble), dhidden};
}

// Negative log-likelihoods, in the order of `hidden`.
std::vector<double> losses_of(const Tensor& hidden, const Tensor& head, const Tensor& targets, int64_t chunk) {
  check_range(targets, head.size(0));
  const int64_t count = hidden.size(0);
  auto buffer = at::empty({std::min(chunk, count), head.size(0)}, hidden.options());
  std::vector<double> losses(count);
  for (int64_t start = 0; start < count; start += chunk) {
    auto logits = logits_of(hidden, head, start, std::min(chunk, count - start), buffer);
    rows_of_chunk(logits, targets.const_data_ptr<int64_t>() + start, nullptr, losses.data() + start);
  }
  return losses;
}

}  // namespace
}  // namespace tangelo

extern "C" {

char* tangelo_cross_entropy(const at::Tensor* hidden, const at::Tensor* head, const at::Tensor* targets,
                            const at::Tensor* weights, double inverse_total_weight, const at::Tensor* main_grad,
                            int64_t chunk, at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    tangelo::check(*hidden, *head, *targets, chunk);
    auto grad = tangelo::maybe(main_grad);
    TORCH_CHECK(!grad || (grad->sizes() == head->sizes() && grad->is_contiguous() && grad->scalar_type() == at::kFloat),
                "cross_entropy: the main gradient must be contiguous float32 of shape ", head->sizes());
    auto result =
        tangelo::with_gradients(*hidden, *head, *targets, *weights, inverse_total_weight, grad, chunk);
    out[0] = tangelo::give(result.loss_sum);
    out[1] = tangelo::give(result.dhidden);
  });
}

char* tangelo_cross_entropy_loss(const at::Tensor* hidden, const at::Tensor* head, const at::Tensor* targets,
                                 const at::Tensor* weights, int64_t chunk, double* loss_sum) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    tangelo::check(*hidden, *head, *targets, chunk);
    auto tokens = tangelo::weighted_tokens(*hidden, *targets, *weights);
    auto losses = tangelo::losses_of(tokens.hidden, *head, tokens.targets, chunk);
    const float* weight = tokens.weights.const_data_ptr<float>();
    *loss_sum = 0;
    for (size_t i = 0; i < losses.size(); i++) *loss_sum += weight[i] * losses[i];
  });
}

}  // extern "C"
