// Attention of spans of queries over spans of keys on the CPU, in fp32 and bf16: forward into a running softmax,
// backward into running sums.
//
// Forward, the unit of work is one query head of one group of spans that share query rows; it takes its spans in order.
// Backward, it is one query head, with all spans in order; keys' gradients are made per query head and then added over
// the heads of a group in order.
#include <numeric>

#include "attention.h"

extern "C" {

// Spans arrive sorted by their first query, and trimmed: every query sees a key, every key has a query behind it.
struct AttentionSpan {
  int64_t first_query, num_queries, first_key, num_keys, offset;
};

}  // extern "C"

namespace tangelo {
namespace {

typedef std::vector<AttentionSpan> Spans;

struct Group {
  size_t begin, end;  // spans
  int64_t pairs;      // of queries and keys, roughly
};

struct GroupOfHead {
  Group group;
  int64_t head;
};

void check_span(const AttentionSpan& s, const Tensor& q, const Tensor& k, int64_t window) {
  const bool inside = s.first_query >= 0 && s.num_queries > 0 && s.first_query + s.num_queries <= q.size(0) &&
                      s.first_key >= 0 && s.num_keys > 0 && s.first_key + s.num_keys <= k.size(0);
  const bool trimmed = s.offset >= 0 && s.num_keys <= s.offset + s.num_queries &&
                       s.offset + s.num_queries - window < s.num_keys;
  TORCH_CHECK(inside && trimmed, "attention: a span of queries ", s.first_query, " + ", s.num_queries, ", keys ",
              s.first_key, " + ", s.num_keys, ", offset ", s.offset, " of ", q.size(0), " queries and ", k.size(0),
              " keys was not trimmed to the window ", window);
}

// Runs of spans that share query rows.
std::vector<Group> groups_of(const Spans& spans) {
  std::vector<Group> groups;
  int64_t last_query = -1;
  for (size_t i = 0; i < spans.size(); i++) {
    if (spans[i].first_query >= last_query) groups.push_back({i, i, 0});
    last_query = std::max(last_query, spans[i].first_query + spans[i].num_queries);
    groups.back().end = i + 1;
    groups.back().pairs += spans[i].num_queries * spans[i].num_keys;
  }
  return groups;
}

cpu::AttentionShape shape_of(const AttentionSpan& span, const Geometry& g, double scale, int64_t window) {
  return {span.num_queries,   span.num_keys,           span.offset, g.dim, g.heads * g.dim,
          g.key_heads * g.dim, static_cast<float>(scale), window};
}

// The most floats that `scratch_of` asks for any span.
int64_t most_scratch(const Spans& spans, const Geometry& g, int64_t (*scratch_of)(const cpu::AttentionShape&)) {
  int64_t most = 0;
  for (const auto& span : spans) most = std::max(most, scratch_of(shape_of(span, g, 1.0, 1)));
  return most;
}

void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Spans& spans, double scale, int64_t window,
            Tensor out, Tensor lse) {
  const Geometry g = geometry_of(q, k);
  const auto& kernels = kernels_for(q);
  std::vector<GroupOfHead> units;
  for (const Group& group : groups_of(spans)) {
    for (int64_t head = 0; head < g.heads; head++) units.push_back({group, head});
  }
  std::stable_sort(units.begin(), units.end(),
                   [](const GroupOfHead& a, const GroupOfHead& b) { return a.group.pairs > b.group.pairs; });
  const int64_t scratch_floats = most_scratch(spans, g, cpu::kernels().attention_scratch);
  for_units(units, scratch_floats, [&](const GroupOfHead& unit, float* scratch) {
    for (size_t i = unit.group.begin; i < unit.group.end; i++) {
      const AttentionSpan& span = spans[i];
      const int64_t in_query = (span.first_query * g.heads + unit.head) * g.dim;
      const int64_t in_key = (span.first_key * g.key_heads + unit.head / g.group()) * g.dim;
      kernels.attention_running(shape_of(span, g, scale, window), at_element(q, in_query), at_element(k, in_key),
                                at_element(v, in_key), at_element(out, in_query),
                                lse.data_ptr<float>() + unit.head * q.size(0) + span.first_query, scratch);
    }
  });
}

// Gradients of keys per query head: those of key rows [first, end), where any span is.
struct KeyGradients {
  int64_t first, end;
  Tensor dk, dv;
};

// With as many key heads as query heads, the sums themselves.
KeyGradients key_gradients(const Spans& spans, const Geometry& g, const Tensor& dk, const Tensor& dv) {
  int64_t first = dk.size(0), end = 0;
  for (const auto& span : spans) {
    first = std::min(first, span.first_key);
    end = std::max(end, span.first_key + span.num_keys);
  }
  if (g.group() == 1) return {first, end, dk.narrow(0, first, end - first), dv.narrow(0, first, end - first)};
  const std::vector<int64_t> shape = {end - first, g.heads, g.dim};
  return {first, end, at::zeros(shape, dk.options()), at::zeros(shape, dv.options())};
}

void attend_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& dout,
                     const Tensor& lse, const Spans& spans, double scale, int64_t window, Tensor dq, Tensor dk,
                     Tensor dv) {
  const Geometry g = geometry_of(q, k);
  const auto& kernels = kernels_for(q);
  KeyGradients per_head = key_gradients(spans, g, dk, dv);
  std::vector<int64_t> heads(g.heads);
  std::iota(heads.begin(), heads.end(), 0);
  const int64_t scratch_floats = most_scratch(spans, g, cpu::kernels().attention_backward_scratch);
  for_units(heads, scratch_floats, [&](int64_t head, float* scratch) {
    for (const AttentionSpan& span : spans) {
      const int64_t in_query = (span.first_query * g.heads + head) * g.dim;
      const int64_t in_key = (span.first_key * g.key_heads + head / g.group()) * g.dim;
      const int64_t in_gradient = ((span.first_key - per_head.first) * g.heads + head) * g.dim;
      kernels.attention_backward_running(
          shape_of(span, g, scale, window), at_element(q, in_query), at_element(k, in_key), at_element(v, in_key),
          at_element(out, in_query), at_element(dout, in_query),
          lse.const_data_ptr<float>() + head * q.size(0) + span.first_query, at_element(dq, in_query),
          per_head.dk.data_ptr<float>() + in_gradient, per_head.dv.data_ptr<float>() + in_gradient, g.heads * g.dim,
          scratch);
    }
  });
  if (g.group() == 1) return;
  dk.narrow(0, per_head.first, per_head.end - per_head.first).add_(sum_groups(per_head.dk, g, at::kFloat));
  dv.narrow(0, per_head.first, per_head.end - per_head.first).add_(sum_groups(per_head.dv, g, at::kFloat));
}

Spans checked(const AttentionSpan* spans, size_t num_spans, const Tensor& q, const Tensor& k, int64_t window) {
  for (size_t i = 0; i < num_spans; i++) check_span(spans[i], q, k, window);
  return Spans(spans, spans + num_spans);
}

}  // namespace
}  // namespace tangelo

extern "C" {

// The caller checks types and shapes.
char* tangelo_attend(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const AttentionSpan* spans,
                     size_t num_spans, double scale, int64_t window, const at::Tensor* out, const at::Tensor* lse) {
  return tangelo::guarded([&] {
    if (num_spans == 0) return;
    tangelo::attend(q->contiguous(), k->contiguous(), v->contiguous(),
                    tangelo::checked(spans, num_spans, *q, *k, window), scale, window, *out, *lse);
  });
}

char* tangelo_attend_backward(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* out,
                              const at::Tensor* dout, const at::Tensor* lse, const AttentionSpan* spans,
                              size_t num_spans, double scale, int64_t window, const at::Tensor* dq,
                              const at::Tensor* dk, const at::Tensor* dv) {
  return tangelo::guarded([&] {
    if (num_spans == 0) return;
    tangelo::attend_backward(q->contiguous(), k->contiguous(), v->contiguous(), out->contiguous(), dout->contiguous(),
                             *lse, tangelo::checked(spans, num_spans, *q, *k, window), scale, window, *dq, *dk, *dv);
  });
}

}  // extern "C"
