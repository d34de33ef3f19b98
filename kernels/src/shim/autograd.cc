// Backward with given output gradients, storage resizing and version counters: what tch lacks of autograd.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "common.h"

namespace {

std::vector<at::Tensor> gather(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; i++) list.push_back(*tensors[i]);
  return list;
}

}  // namespace

extern "C" {

void tangelo_free(char* message) { free(message); }

char* tangelo_backward(at::Tensor* const* outputs, at::Tensor* const* grads, size_t count) {
  return tangelo::guarded([&] {
    torch::autograd::backward(gather(outputs, count), gather(grads, count));
  });
}

char* tangelo_grad(at::Tensor* const* outputs, at::Tensor* const* grads, size_t num_outputs,
                   at::Tensor* const* inputs, size_t num_inputs, at::Tensor** results) {
  return tangelo::guarded([&] {
    auto found = torch::autograd::grad(gather(outputs, num_outputs), gather(inputs, num_inputs),
                                       gather(grads, num_outputs));
    for (size_t i = 0; i < num_inputs; i++) results[i] = tangelo::give(found[i]);
  });
}

char* tangelo_storage_resize(at::Tensor* tensor, int64_t num_bytes) {
  return tangelo::guarded([&] {
    TORCH_CHECK(tensor->is_cpu() || num_bytes == 0 || tensor->storage().allocator() != nullptr,
                "storage_resize: the storage cannot be resized");
    auto storage = tensor->storage();
    if (static_cast<int64_t>(storage.nbytes()) == num_bytes) return;
    if (num_bytes == 0) {
      storage.unsafeGetStorageImpl()->set_data_ptr_noswap(storage.allocator()->allocate(0));
      storage.set_nbytes(0);
      return;
    }
    TORCH_CHECK(storage.nbytes() == 0, "storage_resize: only to zero bytes and back; the storage holds ",
                storage.nbytes(), " bytes and ", num_bytes, " were asked for");
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(storage.allocator()->allocate(num_bytes));
    storage.set_nbytes(num_bytes);
  });
}

char* tangelo_version(const at::Tensor* tensor, int64_t* version) {
  return tangelo::guarded([&] { *version = tensor->unsafeGetTensorImpl()->version_counter().current_version(); });
}

char* tangelo_set_version(const at::Tensor* tensor, int64_t version) {
  return tangelo::guarded([&] {
    // A copy shares the counter with the tensor and with all views of its storage.
    auto counter = tensor->unsafeGetTensorImpl()->version_counter();
    counter.set_version(version);
  });
}

}  // extern "C"
