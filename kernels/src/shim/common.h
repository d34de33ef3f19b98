// What every file of the shim shares: how errors and tensors cross between C++ and Rust.
//
// A function of the shim is `extern "C"`, returns null or a message that Rust frees with tangelo_free, and hands
// tensors over as `at::Tensor*`: borrowed when they come in, owned by Rust when they go out.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>

#include "cpu/kernels.h"

// at::parallel_for is a template: compiled without OpenMP it runs everything on one thread and says nothing.
#ifndef INTRA_OP_PARALLEL
#error "compile the shim with -fopenmp: without it, at::parallel_for runs on one thread"
#endif

namespace tangelo {

using at::Tensor;

inline char* message_of(const std::exception& error) {
  if (const auto* with_trace = dynamic_cast<const c10::Error*>(&error)) {
    return strdup(with_trace->what_without_backtrace());
  }
  return strdup(error.what());
}

// Runs `body`; every C++ exception becomes a message, so that none unwinds into Rust.
template <class Body>
char* guarded(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return message_of(error);
  } catch (...) {
    return strdup("an exception of unknown type in the shim");
  }
}

inline Tensor* give(Tensor tensor) { return new Tensor(std::move(tensor)); }

inline std::optional<Tensor> maybe(const Tensor* tensor) {
  if (tensor == nullptr || !tensor->defined()) return std::nullopt;
  return *tensor;
}

// The type in which sums are kept: double for double, float for everything else.
inline at::ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- the CPU kernels -----------------------------------------------------------------------------------------

// Whether the kernels of cpu/ take this tensor; otherwise plain ATen operations do the work.
inline bool has_kernels(const Tensor& tensor) {
  return tensor.is_cpu() && (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16);
}

inline const cpu::Typed& kernels_for(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? cpu::kernels().f32 : cpu::kernels().b16;
}

// Rows a thread should at least take, so that starting it pays.
inline int64_t grain_rows(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)); }

inline Tensor rows_of(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

// out = a b, or out += a b when `add`; through whichever library is fastest for the type (see products.cc).
void product(Tensor& out, const Tensor& a, const Tensor& b, bool add);

// out [rows, O] = x [rows, I] weight [O, I]^T + bias, all contiguous, `bias` undefined where there is none. On the CPU, in
// fp32 and bf16, an output's bits depend on its row of x and its row of the weight alone.
void linear_rows(Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias);

// main_grad += dy^T x for dy [T, O], x [T, I]; main_grad in fp32, or in their type.
void add_weight_grad(Tensor& main_grad, const Tensor& dy, const Tensor& x);

}  // namespace tangelo
