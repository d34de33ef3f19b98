// libtorch's state for GPUs that tch does not reach. Used by device/ alone.

#include "common.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <cstdlib>

// Operations that have a deterministic form use it; one that has none warns once and runs all the same.
extern "C" char* tangelo_use_deterministic_operations() {
  return tangelo::guarded([] {
    // cuBLAS wants it for equal bits and reads it when it starts; what the user has set stays.
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
    at::globalContext().setDeterministicCuDNN(true);
    at::globalContext().setBenchmarkCuDNN(false);
  });
}

extern "C" char* tangelo_gpu_memory(int32_t index, int64_t* out) {
  return tangelo::guarded([&] {
    const auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[all].current;
    out[1] = stats.allocated_bytes[all].peak;
    out[2] = stats.reserved_bytes[all].current;
  });
}
