// Causal attention over packed documents on the CPU, in fp32 and bf16.
//
// The unit of work is one query head of one document. Units are independent and taken by threads as they come free, the
// longest first, so the result does not depend on the number of threads. Keys' gradients are made per query head, then
// summed over the heads of a group in order, then over the documents that share a prefix, in order and in fp32.
#include "attention.h"
#include "weights.h"

namespace tangelo {
namespace {

// Where documents lie among packed tokens.
struct Documents {
  std::vector<int64_t> bounds;    // 0, ..., T
  std::vector<int64_t> prefixes;  // of each document begin and end of the tokens that go before its own; or nothing

  size_t count() const { return bounds.size() - 1; }
  int64_t own(size_t i) const { return bounds[i + 1] - bounds[i]; }
  int64_t prefix(size_t i) const { return prefixes.empty() ? 0 : prefixes[2 * i + 1] - prefixes[2 * i]; }
};

struct Unit {
  int64_t first_query, num_queries, first_key, num_keys, head;
};

std::vector<Unit> units_of(const Documents& documents, int64_t heads) {
  std::vector<Unit> units;
  int64_t first_key = 0;
  for (size_t i = 0; i < documents.count(); i++) {
    const int64_t keys = documents.prefix(i) + documents.own(i);
    for (int64_t head = 0; head < heads; head++) {
      units.push_back({documents.bounds[i], documents.own(i), first_key, keys, head});
    }
    first_key += keys;
  }
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
    return a.num_queries * a.num_keys > b.num_queries * b.num_keys;
  });
  return units;
}

// Keys or values [T, K, hd] document by document, each behind its prefix.
Tensor with_prefixes(const Tensor& x, const Documents& documents) {
  if (documents.prefixes.empty()) return x;
  std::vector<Tensor> pieces;
  for (size_t i = 0; i < documents.count(); i++) {
    if (documents.prefix(i) > 0) pieces.push_back(x.narrow(0, documents.prefixes[2 * i], documents.prefix(i)));
    pieces.push_back(x.narrow(0, documents.bounds[i], documents.own(i)));
  }
  return at::cat(pieces, 0);
}

// The way back: what every document's keys got, added at the tokens that they were taken from.
Tensor without_prefixes(const Tensor& gradient, const Documents& documents) {
  if (documents.prefixes.empty()) return gradient;
  auto sum = at::zeros({documents.bounds.back(), gradient.size(1), gradient.size(2)}, gradient.options());
  int64_t from = 0;
  auto add = [&](int64_t to, int64_t n) {
    if (n > 0) sum.narrow(0, to, n).add_(gradient.narrow(0, from, n));
    from += n;
  };
  for (size_t i = 0; i < documents.count(); i++) {
    if (documents.prefix(i) > 0) add(documents.prefixes[2 * i], documents.prefix(i));
    add(documents.bounds[i], documents.own(i));
  }
  return sum;
}

cpu::AttentionShape shape_of(const Unit& unit, const Geometry& g, double scale, int64_t window) {
  return {unit.num_queries,
          unit.num_keys,
          unit.num_keys - unit.num_queries,
          g.dim,
          g.heads * g.dim,
          g.key_heads * g.dim,
          static_cast<float>(scale),
          std::min(window, unit.num_keys)};
}

// The most floats that `scratch_of` asks for any unit.
int64_t most_scratch(const std::vector<Unit>& units, const Geometry& g,
                     int64_t (*scratch_of)(const cpu::AttentionShape&)) {
  int64_t most = 0;
  for (const Unit& unit : units) most = std::max(most, scratch_of(shape_of(unit, g, 1.0, 1)));
  return most;
}

// `lse` [H, T] may be undefined.
Tensor forward_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Unit>& units, double scale,
                  int64_t window, Tensor& lse) {
  const Geometry g = geometry_of(q, k);
  auto out = at::empty_like(q);
  const int64_t tokens = q.size(0);
  const auto& kernels = kernels_for(q);
  const int64_t scratch_floats = most_scratch(units, g, cpu::kernels().attention_scratch);
  for_units(units, scratch_floats, [&](const Unit& unit, float* scratch) {
    const int64_t in_query = (unit.first_query * g.heads + unit.head) * g.dim;
    const int64_t in_key = (unit.first_key * g.key_heads + unit.head / g.group()) * g.dim;
    float* unit_lse = lse.defined() ? lse.data_ptr<float>() + unit.head * tokens + unit.first_query : nullptr;
    kernels.attention(shape_of(unit, g, scale, window), at_element(q, in_query), at_element(k, in_key),
                      at_element(v, in_key), at_element(out, in_query), unit_lse, scratch);
  });
  return out;
}

struct Attention : Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Documents& documents, double scale, int64_t window) {
    auto lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
    auto out = forward_of(q, with_prefixes(k, documents), with_prefixes(v, documents),
                          units_of(documents, q.size(1)), scale, window, lse);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["bounds"] = documents.bounds;
    ctx->saved_data["prefixes"] = documents.prefixes;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto stored = ctx->get_saved_variables();
    const Documents documents = {ctx->saved_data["bounds"].toIntVector(), ctx->saved_data["prefixes"].toIntVector()};
    const Tensor &q = stored[0], &out = stored[3], &lse = stored[4];
    const Tensor k = with_prefixes(stored[1], documents), v = with_prefixes(stored[2], documents);
    auto dout = grads[0].contiguous();
    const Geometry g = geometry_of(q, k);
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t window = ctx->saved_data["window"].toInt(), tokens = q.size(0);
    auto dq = at::empty_like(q);
    auto dk = at::empty({k.size(0), g.heads, g.dim}, lse.options()), dv = at::empty_like(dk);
    auto units = units_of(documents, g.heads);
    const auto& kernels = kernels_for(q);
    const int64_t scratch_floats = most_scratch(units, g, cpu::kernels().attention_backward_scratch);
    for_units(units, scratch_floats, [&](const Unit& unit, float* scratch) {
      const int64_t in_query = (unit.first_query * g.heads + unit.head) * g.dim;
      const int64_t in_key = (unit.first_key * g.key_heads + unit.head / g.group()) * g.dim;
      const int64_t in_gradient = (unit.first_key * g.heads + unit.head) * g.dim;
      kernels.attention_backward(shape_of(unit, g, scale, window), at_element(q, in_query), at_element(k, in_key),
                                 at_element(v, in_key), at_element(out, in_query), at_element(dout, in_query),
                                 lse.const_data_ptr<float>() + unit.head * tokens + unit.first_query,
                                 at_element(dq, in_query), dk.data_ptr<float>() + in_gradient,
                                 dv.data_ptr<float>() + in_gradient, g.heads * g.dim, scratch);
    });
    auto gradient = [&](const Tensor& per_head) {
      return without_prefixes(sum_groups(per_head, g, at::kFloat), documents).to(k.scalar_type());
    };
    return {dq, gradient(dk), gradient(dv), Tensor(), Tensor(), Tensor()};
  }
};

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && k.size(2) == q.size(2) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0,
              "attention: queries of shape ", q.sizes(), ", keys ", k.sizes(), " and values ", v.sizes(),
              " do not fit; expected [T, H, hd], [T, K, hd] twice, H a multiple of K");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "attention: queries, keys and values of types ", q.scalar_type(), ", ", k.scalar_type(), ", ",
              v.scalar_type());
}

}  // namespace
}  // namespace tangelo

extern "C" {

// `window` is the number of keys a query sees, or at least the longest document's length for all. `prefixes` has two
// numbers for each document, or is null.
char* tangelo_attention(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const int64_t* bounds,
                        size_t num_bounds, const int64_t* prefixes, double scale, int64_t window, at::Tensor** out) {
  return tangelo::guarded([&] {
    tangelo::check(*q, *k, *v);
    TORCH_CHECK(q->size(0) == k->size(0), "attention: ", q->size(0), " queries and ", k->size(0), " keys");
    tangelo::Documents documents = {{bounds, bounds + num_bounds}, {}};
    if (prefixes != nullptr) documents.prefixes.assign(prefixes, prefixes + 2 * documents.count());
    *out = tangelo::give(
        tangelo::Attention::apply(q->contiguous(), k->contiguous(), v->contiguous(), documents, scale, window));
  });
}

char* tangelo_attention_with_past(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, double scale,
                                  int64_t window, at::Tensor** out) {
  return tangelo::guarded([&] {
    tangelo::check(*q, *k, *v);
    TORCH_CHECK(q->size(0) <= k->size(0), "attention_with_past: ", q->size(0), " queries and only ", k->size(0),
                " keys");
    std::vector<tangelo::Unit> units;
    for (int64_t head = 0; head < q->size(1); head++) units.push_back({0, q->size(0), 0, k->size(0), head});
    at::Tensor no_lse;
    *out = tangelo::give(
        tangelo::forward_of(q->contiguous(), k->contiguous(), v->contiguous(), units, scale, window, no_lse));
  });
}

}  // extern "C"
