// What every file of the shim shares: how errors and tensors cross between C++ and Rust.
//
// A function of the shim is `extern "C"`, returns null or a message that Rust frees with tangelo_free, and hands
// tensors over as `at::Tensor*`: borrowed when they come in, owned by Rust when they go out.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>

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

}  // namespace tangelo
