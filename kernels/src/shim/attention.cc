// Causal attention over packed documents on the CPU, in fp32 and bf16.
//
// The unit of work is one query head of one document. Units are independent and taken by threads as they come free, the
// longest first, so the result does not depend on the number of threads. Keys' gradients are made per query head and
// then summed over the heads of a group in order.
#include "attention.h"
#include "weights.h"

namespace tangelo {
namespace {

struct Unit {
  int64_t start, length, head;
};

std::vector<Unit> units_of(const std::vector<int64_t>& bounds, int64_t heads) {
  std::vector<Unit> units;
  for (size_t i = 0; i + 1 < bounds.size(); i++) {
    for (int64_t head = 0; head < heads; head++) units.push_back({bounds[i], bounds[i + 1] - bounds[i], head});
  }
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.length > b.length; });
  return units;
}

cpu::AttentionShape shape_of(const Geometry& g, int64_t num_queries, int64_t num_keys, double scale, int64_t window) {
  return {num_queries,         num_keys,                  num_keys - num_queries,    g.dim, g.heads * g.dim,
          g.key_heads * g.dim, static_cast<float>(scale), std::min(window, num_keys)};
}

// `lse` [H, T] may be undefined. Of a single document the queries may be the last tokens only.
Tensor forward_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& bounds, double scale,
                  int64_t window, Tensor& lse) {
  const Geometry g = geometry_of(q, k);
  auto out = at::empty_like(q);
  const int64_t past = k.size(0) - q.size(0), tokens = q.size(0);
  auto units = units_of(bounds, g.heads);
  if (units.empty()) return out;
  auto shape_for = [&](int64_t length) { return shape_of(g, length - past, length, scale, window); };
  const auto& kernels = kernels_for(q);
  for_units(units, cpu::kernels().attention_scratch(shape_for(units[0].length)), [&](const Unit& unit, float* scratch) {
    const int64_t in_query = (unit.start * g.heads + unit.head) * g.dim;
    const int64_t in_key = (unit.start * g.key_heads + unit.head / g.group()) * g.dim;
    float* unit_lse = lse.defined() ? lse.data_ptr<float>() + unit.head * tokens + unit.start : nullptr;
    kernels.attention(shape_for(unit.length), at_element(q, in_query), at_element(k, in_key), at_element(v, in_key),
                      at_element(out, in_query), unit_lse, scratch);
  });
  return out;
}

struct Attention : Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::vector<int64_t>& bounds, double scale, int64_t window) {
    auto lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
    auto out = forward_of(q, k, v, bounds, scale, window, lse);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["bounds"] = bounds;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto stored = ctx->get_saved_variables();
    const Tensor &q = stored[0], &k = stored[1], &v = stored[2], &out = stored[3], &lse = stored[4];
    auto dout = grads[0].contiguous();
    const Geometry g = geometry_of(q, k);
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t window = ctx->saved_data["window"].toInt(), tokens = q.size(0);
    auto dq = at::empty_like(q);
    auto dk = at::empty(q.sizes(), lse.options()), dv = at::empty(q.sizes(), lse.options());
    auto units = units_of(ctx->saved_data["bounds"].toIntVector(), g.heads);
    auto shape_for = [&](int64_t length) { return shape_of(g, length, length, scale, window); };
    const auto& kernels = kernels_for(q);
    const int64_t scratch_floats = cpu::kernels().attention_backward_scratch(shape_for(units[0].length));
    for_units(units, scratch_floats, [&](const Unit& unit, float* scratch) {
      const int64_t in_query = (unit.start * g.heads + unit.head) * g.dim;
      const int64_t in_key = (unit.start * g.key_heads + unit.head / g.group()) * g.dim;
      kernels.attention_backward(shape_for(unit.length), at_element(q, in_query), at_element(k, in_key),
                                 at_element(v, in_key), at_element(out, in_query), at_element(dout, in_query),
                                 lse.const_data_ptr<float>() + unit.head * tokens + unit.start,
                                 at_element(dq, in_query), dk.data_ptr<float>() + in_query,
                                 dv.data_ptr<float>() + in_query, g.heads * g.dim, scratch);
    });
    return {dq, sum_groups(dk, g, k.scalar_type()), sum_groups(dv, g, v.scalar_type()), Tensor(), Tensor(), Tensor()};
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

// `window` is the number of keys a query sees, or at least the longest document's length for all.
char* tangelo_attention(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const int64_t* bounds,
                        size_t num_bounds, double scale, int64_t window, at::Tensor** out) {
  return tangelo::guarded([&] {
    tangelo::check(*q, *k, *v);
    TORCH_CHECK(q->size(0) == k->size(0), "attention: ", q->size(0), " queries and ", k->size(0), " keys");
    std::vector<int64_t> all_bounds(bounds, bounds + num_bounds);
    *out = tangelo::give(
        tangelo::Attention::apply(q->contiguous(), k->contiguous(), v->contiguous(), all_bounds, scale, window));
  });
}

char* tangelo_attention_with_past(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, double scale,
                                  int64_t window, at::Tensor** out) {
  return tangelo::guarded([&] {
    tangelo::check(*q, *k, *v);
    TORCH_CHECK(q->size(0) <= k->size(0), "attention_with_past: ", q->size(0), " queries and only ", k->size(0),
                " keys");
    at::Tensor no_lse;
    *out = tangelo::give(tangelo::forward_of(q->contiguous(), k->contiguous(), v->contiguous(), {0, k->size(0)}, scale,
                                             window, no_lse));
  });
}

}  // extern "C"
