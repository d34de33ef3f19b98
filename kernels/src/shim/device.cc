// libtorch's state for devices that tch does not reach. Used by device/ alone.

#include "common.h"

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <atomic>

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
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    const auto device = static_cast<c10::DeviceIndex>(index);
    const auto stats = allocator->getDeviceStats(device);
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[all].current;
    out[1] = stats.allocated_bytes[all].peak;
    out[2] = stats.reserved_bytes[all].current;
    out[3] = static_cast<int64_t>(allocator->getMemoryInfo(device).first);
  });
}

namespace {

// Bytes of tensors in main memory that the thread it is pushed on allocates, less those it frees.
struct AllocationCounter : c10::MemoryReportingInfoBase {
  std::atomic<int64_t> current{0}, peak{0};

  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    const int64_t now = current += size;
    int64_t known = peak;
    while (now > known && !peak.compare_exchange_weak(known, now)) {
    }
  }
  bool memoryProfilingEnabled() const override { return true; }
};

}  // namespace

extern "C" char* tangelo_count_allocations_begin() {
  return tangelo::guarded([] {
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<AllocationCounter>());
  });
}

// What this thread's allocations are reported to, to be freed with tangelo_debug_info_free.
extern "C" char* tangelo_debug_info_current(std::shared_ptr<c10::ThreadLocalDebugInfo>** out) {
  return tangelo::guarded([&] {
    *out = new std::shared_ptr<c10::ThreadLocalDebugInfo>(c10::ThreadLocalDebugInfo::current());
  });
}

// Exchanges it with the calling thread's.
extern "C" char* tangelo_debug_info_swap(std::shared_ptr<c10::ThreadLocalDebugInfo>* info) {
  return tangelo::guarded([&] {
    auto before = c10::ThreadLocalDebugInfo::current();
    c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(*info);
    *info = std::move(before);
  });
}

extern "C" char* tangelo_debug_info_free(std::shared_ptr<c10::ThreadLocalDebugInfo>* info) {
  return tangelo::guarded([&] { delete info; });
}

// Ends the counting begun last on this thread.
extern "C" char* tangelo_count_allocations_end(int64_t* peak) {
  return tangelo::guarded([&] {
    auto counter = c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
    *peak = static_cast<AllocationCounter*>(counter.get())->peak;
  });
}
