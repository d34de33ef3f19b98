// What attention over whole documents and attention over spans share: heads in token-major tensors, and units of work
// that threads take as they come free, so that no result depends on the number of threads.
#pragma once
#include <atomic>
#include <vector>

#include "common.h"

namespace tangelo {

struct Geometry {
  int64_t heads, key_heads, dim;
  int64_t group() const { return heads / key_heads; }
};

inline Geometry geometry_of(const Tensor& q, const Tensor& k) { return {q.size(1), k.size(1), q.size(2)}; }

// Runs `work(unit, scratch)` for every unit, in order, with `scratch_floats` floats for each thread.
template <class Unit, class Work>
void for_units(const std::vector<Unit>& units, int64_t scratch_floats, Work work) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), units.size());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    auto scratch = at::empty({scratch_floats}, at::kFloat);
    for (size_t i = next++; i < units.size(); i = next++) work(units[i], scratch.data_ptr<float>());
  });
}

inline const char* at_element(const Tensor& tensor, int64_t elements) {
  return static_cast<const char*>(tensor.const_data_ptr()) + elements * tensor.element_size();
}
inline char* at_element(Tensor& tensor, int64_t elements) {
  return static_cast<char*>(tensor.data_ptr()) + elements * tensor.element_size();
}

// [T, H, hd] in fp32 to [T, K, hd] in `type`, heads of a group added in order.
inline Tensor sum_groups(const Tensor& per_head, const Geometry& g, at::ScalarType type) {
  if (g.group() == 1) return per_head.to(type);
  auto grouped = per_head.view({-1, g.key_heads, g.group(), g.dim});
  auto sum = grouped.select(2, 0) + grouped.select(2, 1);
  for (int64_t i = 2; i < g.group(); i++) sum.add_(grouped.select(2, i));
  return sum.to(type);
}

}  // namespace tangelo
