// Drawing tokens from hidden states, and log-probabilities of given ones, on the CPU; no graph. Logits are products whose
// rows do not depend on each other, and everything after works on one row, so nothing depends on the batch. Where ranks hold
// parts of the vocabulary, each names its contender and what the others must know of its part.
#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"

extern "C" {

// One draw from the logits of hidden row `row`. A temperature of 0 asks for the likeliest token. `top_k` 0, `top_p` 1 and
// `min_p` 0 are off. Tokens `banned` are never drawn.
struct SampleRow {
  int64_t row, top_k;
  double temperature, top_p, min_p;
  uint32_t key[2];
  const int64_t* banned;
  int64_t num_banned;
};

struct SampledToken {
  int64_t token;
  double logprob;           // of the model, at temperature 1
  double sampling_logprob;  // of the distribution that was drawn from
};

// The winner among the tokens that one rank holds, -1 where all of them are banned: how far it leads, comparable between
// ranks, and its logit; of all tokens here the largest logit and the sum of exp(logit - largest); the same three at the
// draw's temperature, without banned tokens.
struct Contender {
  double token, lead, logit, largest, sum, tempered, tempered_largest, tempered_sum;
};

}  // extern "C"

namespace tangelo {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// A row of logits with room to look for the likeliest tokens; one for each thread.
struct Candidates {
  std::vector<float> values, weights;
  std::vector<int32_t> tokens, order;
};

float value_at(const Tensor& logits, const char* row, int64_t token) {
  if (logits.scalar_type() == at::kFloat) return reinterpret_cast<const float*>(row)[token];
  return static_cast<float>(reinterpret_cast<const at::BFloat16*>(row)[token]);
}

void set_value(const Tensor& logits, char* row, int64_t token, float value) {
  if (logits.scalar_type() == at::kFloat) {
    reinterpret_cast<float*>(row)[token] = value;
  } else {
    reinterpret_cast<at::BFloat16*>(row)[token] = at::BFloat16(value);
  }
}

// Minus infinity in place of the logits of banned tokens, as long as it lives. The row's first token is `start`.
struct Ban {
  Ban(const Tensor& logits, char* row, int64_t start, const SampleRow& asked)
      : logits(logits), row(row), start(start), asked(asked) {
    for (int64_t b = 0; b < asked.num_banned; b++) {
      if (!is_here(b)) continue;
      hidden.push_back(value_at(logits, row, asked.banned[b] - start));
      count += hidden.back() != -INF;
      set_value(logits, row, asked.banned[b] - start, -INF);
    }
  }

  ~Ban() {
    for (int64_t b = asked.num_banned; b-- > 0;) {
      if (!is_here(b)) continue;
      set_value(logits, row, asked.banned[b] - start, hidden.back());
      hidden.pop_back();
    }
  }

  bool is_here(int64_t b) const { return asked.banned[b] >= start && asked.banned[b] - start < logits.size(1); }

  const Tensor& logits;
  char* row;
  int64_t start;
  const SampleRow& asked;
  std::vector<float> hidden;
  int64_t count = 0;  // different tokens
};

// Fills `c` with the tokens within `depth` (in units of the tempered logits) of the largest, likeliest first.
void collect(const cpu::Typed& kernels, const char* row, int64_t width, float highest, float inverse, double depth,
             Candidates& c) {
  c.values.resize(width + 1), c.tokens.resize(width + 1);
  const float threshold = static_cast<float>(highest - depth / inverse);
  const int64_t count = kernels.above_row(row, width, threshold, c.values.data(), c.tokens.data());
  c.order.resize(count);
  for (int64_t i = 0; i < count; i++) c.order[i] = i;
  std::sort(c.order.begin(), c.order.end(), [&](int32_t a, int32_t b) {
    return c.values[a] > c.values[b] || (c.values[a] == c.values[b] && c.tokens[a] < c.tokens[b]);
  });
  std::vector<float> values(count);
  std::vector<int32_t> tokens(count);
  for (int64_t i = 0; i < count; i++) values[i] = c.values[c.order[i]], tokens[i] = c.tokens[c.order[i]];
  c.values.swap(values), c.tokens.swap(tokens);
  c.weights.resize(count);
  cpu::kernels().exponentials(c.values.data(), count, inverse, highest * inverse, c.weights.data());
}

double sum_of(const std::vector<float>& weights, size_t count) {
  double sum = 0;
  for (size_t i = 0; i < count; i++) sum += weights[i];
  return sum;
}

// How many of the collected tokens the filters keep: min_p, then top_k, then top_p of what is left. -1 where more must be
// collected to tell. `total` is the sum of the weights of all tokens.
int64_t kept(const SampleRow& asked, const Candidates& c, int64_t allowed, double depth, double total) {
  int64_t count = c.weights.size();
  bool complete = count >= allowed || (asked.min_p > 0 && depth >= -std::log(asked.min_p));
  if (asked.min_p > 0) {
    while (count > 1 && c.weights[count - 1] < asked.min_p) count--;
  }
  if (asked.top_k > 0 && count >= asked.top_k) count = asked.top_k, complete = true;
  const bool filtered = asked.min_p > 0 || asked.top_k > 0;
  if (filtered && !complete) return -1;
  if (asked.top_p >= 1) return complete ? count : -1;
  const double enough = asked.top_p * (filtered ? sum_of(c.weights, count) : total);
  double sum = 0;
  for (int64_t i = 0; i < count; i++) {
    sum += c.weights[i];
    if (sum >= enough) return i + 1;
  }
  return complete ? count : -1;
}

SampledToken draw_filtered(const cpu::Typed& kernels, const SampleRow& asked, const Tensor& logits, const char* row,
                           Candidates& c) {
  const int64_t width = logits.size(1), allowed = width - asked.num_banned;
  const float inverse = static_cast<float>(1.0 / asked.temperature);
  const float highest = value_at(logits, row, kernels.argmax_row(row, width));
  const double total = std::exp(kernels.log_normaliser(row, width, inverse) - double(highest * inverse));
  // Most distributions need a few dozen tokens; flat ones are looked at as a whole, three steps later.
  for (double depth = 8;; depth *= 4) {
    if (asked.min_p > 0) depth = std::max(depth, -std::log(asked.min_p) + 1e-3);
    if (depth > 500) depth = INF;
    collect(kernels, row, width, highest, inverse, depth, c);
    // Nothing compares with NaN; the caller sees it in the log-probability.
    if (c.tokens.empty()) return {0, 0.0, std::nan("")};
    const int64_t count = kept(asked, c, depth == INF ? 0 : allowed, depth, total);
    if (count < 0) continue;
    const int64_t won = cpu::kernels().race_of(c.weights.data(), c.tokens.data(), count, asked.key);
    return {c.tokens[won], 0.0, std::log(double(c.weights[won]) / sum_of(c.weights, count))};
  }
}

SampledToken draw(const cpu::Typed& kernels, const SampleRow& asked, const Tensor& logits, const char* row,
                  Candidates& candidates) {
  const int64_t width = logits.size(1);
  if (asked.temperature == 0) return {kernels.argmax_row(row, width), 0.0, 0.0};
  const bool filtered = asked.top_p < 1 || asked.min_p > 0 || (asked.top_k > 0 && asked.top_k < width);
  if (filtered) return draw_filtered(kernels, asked, logits, row, candidates);
  const float inverse = static_cast<float>(1.0 / asked.temperature);
  const cpu::Race race = kernels.race_row(row, width, 0, inverse, asked.key);
  const double tempered = std::log(double(race.sum)) + double(race.largest);
  return {race.token, 0.0, double(value_at(logits, row, race.token) * inverse) - tempered};
}

// All draws from one row of logits.
void draw_row(const cpu::Typed& kernels, const Tensor& logits, char* row, const SampleRow* asked,
              const std::vector<int64_t>& draws, SampledToken* out, Candidates& candidates) {
  const double normaliser = kernels.log_normaliser(row, logits.size(1), 1.0f);
  for (int64_t i : draws) {
    {
      const Ban ban(logits, row, 0, asked[i]);
      out[i] = draw(kernels, asked[i], logits, row, candidates);
    }
    out[i].logprob = double(value_at(logits, row, out[i].token)) - normaliser;
  }
}

// Who wins a draw among the tokens of one rank, and what its part says. `stats` are those of the untouched logits at
// temperature 1.
Contender contend(const cpu::Typed& kernels, const SampleRow& asked, const Tensor& logits, char* row, int64_t start,
                  const float* stats) {
  Contender c = {-1, -INF, -INF, stats[0], stats[1], -INF, -INF, 0};
  const Ban ban(logits, row, start, asked);
  if (ban.count == logits.size(1)) return c;
  int64_t won;
  if (asked.temperature == 0) {
    won = kernels.argmax_row(row, logits.size(1));
    c.lead = value_at(logits, row, won);
  } else {
    const float inverse = static_cast<float>(1.0 / asked.temperature);
    const cpu::Race race = kernels.race_row(row, logits.size(1), start, inverse, asked.key);
    won = race.token;
    c.lead = std::log(double(race.speed)) + double(race.largest);
    c.tempered = value_at(logits, row, won) * inverse;
    c.tempered_largest = race.largest, c.tempered_sum = race.sum;
  }
  c.token = start + won, c.logit = value_at(logits, row, won);
  return c;
}

void check(const Tensor& hidden, const Tensor& head) {
  TORCH_CHECK(hidden.dim() == 2 && head.dim() == 2 && hidden.size(1) == head.size(1) && head.size(0) > 0,
              "logprobs: hidden states of shape ", hidden.sizes(), " do not fit a head of shape ", head.sizes());
  TORCH_CHECK(hidden.scalar_type() == head.scalar_type(), "logprobs: hidden states of type ", hidden.scalar_type(),
              ", head of type ", head.scalar_type());
}

void check_asked(const SampleRow& asked, int64_t rows) {
  TORCH_CHECK(asked.row >= 0 && asked.row < rows, "sample: hidden row ", asked.row, " of ", rows);
  TORCH_CHECK(asked.temperature >= 0 && asked.top_k >= 0 && asked.top_p > 0 && asked.min_p >= 0 && asked.min_p <= 1,
              "sample: temperature ", asked.temperature, ", top_k ", asked.top_k, ", top_p ", asked.top_p, ", min_p ",
              asked.min_p);
}

void check_draw(const SampleRow& asked, int64_t rows, int64_t vocabulary) {
  check_asked(asked, rows);
  TORCH_CHECK(asked.num_banned < vocabulary, "sample: every token is banned");
  for (int64_t b = 0; b < asked.num_banned; b++) {
    TORCH_CHECK(asked.banned[b] >= 0 && asked.banned[b] < vocabulary, "sample: banned token ", asked.banned[b],
                " is outside the vocabulary of ", vocabulary);
  }
}

// The draws of each row.
std::vector<std::vector<int64_t>> draws_of_rows(int64_t rows, const SampleRow* asked, size_t count) {
  std::vector<std::vector<int64_t>> draws(rows);
  for (size_t i = 0; i < count; i++) draws[asked[i].row].push_back(i);
  return draws;
}

void draw_rows(const Tensor& logits, const SampleRow* asked, size_t count, SampledToken* out) {
  const int64_t rows = logits.size(0), row_bytes = logits.size(1) * logits.element_size();
  for (size_t i = 0; i < count; i++) check_draw(asked[i], rows, logits.size(1));
  const auto draws = draws_of_rows(rows, asked, count);
  const auto& kernels = kernels_for(logits);
  char* data = static_cast<char*>(logits.data_ptr());
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Candidates candidates;
    for (int64_t row = begin; row < end; row++) {
      draw_row(kernels, logits, data + row * row_bytes, asked, draws[row], out, candidates);
    }
  });
}

void sample(const Tensor& hidden, const Tensor& head, const SampleRow* asked, size_t count, SampledToken* out) {
  auto logits = at::empty({hidden.size(0), head.size(0)}, hidden.options());
  linear_rows(logits, hidden, head, Tensor());
  draw_rows(logits, asked, count, out);
}

void contend_rows(const Tensor& logits, int64_t start, const SampleRow* asked, size_t count, Contender* out) {
  const int64_t rows = logits.size(0), width = logits.size(1), row_bytes = width * logits.element_size();
  for (size_t i = 0; i < count; i++) check_asked(asked[i], rows);
  const auto draws = draws_of_rows(rows, asked, count);
  const auto& kernels = kernels_for(logits);
  char* data = static_cast<char*>(logits.data_ptr());
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float stats[4];
      kernels.distribution_row(data + row * row_bytes, width, -1, 1.0f, stats);
      for (int64_t i : draws[row]) {
        out[i] = contend(kernels, asked[i], logits, data + row * row_bytes, start, stats);
      }
    }
  });
}

void logprobs(const Tensor& hidden, const Tensor& head, const Tensor& targets, double temperature, int64_t chunk,
              float* out) {
  const int64_t count = hidden.size(0), width = head.size(0);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const float inverse = static_cast<float>(1.0 / temperature);
  auto buffer = at::empty({std::min(chunk, count), width}, hidden.options());
  const auto& kernels = kernels_for(buffer);
  for (int64_t start = 0; start < count; start += chunk) {
    const int64_t length = std::min(chunk, count - start);
    auto logits = buffer.narrow(0, 0, length);
    linear_rows(logits, hidden.narrow(0, start, length), head, Tensor());
    at::parallel_for(0, length, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        out[start + row] = static_cast<float>(
            kernels.logprob_row(at_element(logits, row * width), width, ids[start + row], inverse));
      }
    });
  }
}

}  // namespace
}  // namespace tangelo

extern "C" {

char* tangelo_sample(const at::Tensor* hidden, const at::Tensor* head, const SampleRow* asked, size_t count,
                     SampledToken* out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    tangelo::check(*hidden, *head);
    tangelo::sample(hidden->contiguous(), *head, asked, count, out);
  });
}

// Draws from whole rows of logits, which are as they were afterwards.
char* tangelo_draw(const at::Tensor* logits, const SampleRow* asked, size_t count, SampledToken* out) {
  return tangelo::guarded([&] {
    TORCH_CHECK(logits->dim() == 2 && logits->is_contiguous() && logits->size(1) > 0, "sample: logits of shape ",
                logits->sizes(), ", expected contiguous rows");
    tangelo::draw_rows(*logits, asked, count, out);
  });
}

// The logits of tokens `start` and those after it.
char* tangelo_contend(const at::Tensor* logits, int64_t start, const SampleRow* asked, size_t count, Contender* out) {
  return tangelo::guarded([&] {
    TORCH_CHECK(logits->dim() == 2 && logits->is_contiguous(), "sample: logits of shape ", logits->sizes(),
                ", expected contiguous rows");
    tangelo::contend_rows(*logits, start, asked, count, out);
  });
}

char* tangelo_token_logprobs(const at::Tensor* hidden, const at::Tensor* head, const at::Tensor* targets,
                             double temperature, int64_t chunk, at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    tangelo::check(*hidden, *head);
    TORCH_CHECK(temperature > 0 && chunk > 0, "logprobs: temperature ", temperature, " and chunks of ", chunk,
                " tokens; both must be positive");
    TORCH_CHECK(targets->dim() == 1 && targets->size(0) == hidden->size(0) && targets->scalar_type() == at::kLong,
                "logprobs: targets of shape ", targets->sizes(), " and type ", targets->scalar_type(),
                ", expected int64 [", hidden->size(0), "]");
    auto ids = targets->contiguous();
    for (int64_t i = 0; i < ids.numel(); i++) {
      const int64_t id = ids.const_data_ptr<int64_t>()[i];
      TORCH_CHECK(id >= 0 && id < head->size(0), "logprobs: target ", id, " at token ", i,
                  " is outside the vocabulary of ", head->size(0));
    }
    auto result = at::empty({hidden->size(0)}, at::kFloat);
    tangelo::logprobs(hidden->contiguous(), *head, ids, temperature, chunk, result.data_ptr<float>());
    *out = tangelo::give(result);
  });
}

}  // extern "C"
