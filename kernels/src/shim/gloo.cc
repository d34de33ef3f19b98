// TCPStore and Gloo's point-to-point messages behind a C interface; used by comm/store.rs and comm/gloo.rs alone.
//
// Every function that can fail returns null, or an error text to be freed with tangelo_free. No exception leaves
// this file.

#include "common.h"

#ifndef USE_C10D_GLOO
#define USE_C10D_GLOO
#endif

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <c10/util/Flags.h>

#include <mutex>
#include <stdexcept>
#include <unordered_set>

C10_DECLARE_int(caffe2_log_level);

namespace {

// c10d logs C++ stack traces for what becomes an error message of ours anyway.
struct Quiet {
  static constexpr int kNothingBelowFatal = 3;
  int before = FLAGS_caffe2_log_level;
  Quiet() {
    if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) {
      FLAGS_caffe2_log_level = kNothingBelowFatal;
    }
  }
  ~Quiet() { FLAGS_caffe2_log_level = before; }
};

using std::chrono::milliseconds;
using c10d::ProcessGroupGloo;
using tangelo::guarded;

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> tcp;
};

struct Work {
  c10::intrusive_ptr<c10d::Work> work;
};

// One connection to every peer, used by several threads. `starting` is held while the group is used, which counts its
// messages without a lock of its own; `mutex` guards the rest and is never held for long. `running` holds the works that
// threads may be waiting for; `aborted` ends them all. Where both are taken, `starting` comes first.
struct Mesh {
  std::mutex starting;
  c10::intrusive_ptr<ProcessGroupGloo> group;
  std::mutex mutex;
  std::unordered_set<c10d::Work*> running;
  bool aborted = false;
};

// Ends the waits of now and of later. `mesh->mutex` is held.
void abort_all(Mesh* mesh) {
  mesh->aborted = true;
  for (auto* work : mesh->running) {
    work->abort();
  }
}

// Bytes seen as a tensor, without owning them: the caller keeps them until the work is freed.
at::Tensor bytes_tensor(void* data, size_t size) {
  return at::from_blob(data, {static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kByte));
}

} // namespace

extern "C" {

char* tangelo_store_open(const char* host, uint16_t port, bool serve, int64_t timeout_ms, Store** out) {
  return guarded([&] {
    Quiet quiet;
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serve;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    *out = new Store{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

void tangelo_store_close(Store* store) {
  guarded([&] { delete store; });
}

uint16_t tangelo_store_port(const Store* store) {
  return store->tcp->getPort();
}

// TCPStore does not wait for the server to have taken a value; the question after it does.
char* tangelo_store_set(Store* store, const char* key, const uint8_t* data, size_t size) {
  return guarded([&] {
    Quiet quiet;
    store->tcp->set(key, std::vector<uint8_t>(data, data + size));
    store->tcp->check({std::string(key)});
  });
}

// Does not wait for the key: `*out` stays null where it is not there. To be freed with tangelo_free.
char* tangelo_store_get(Store* store, const char* key, uint8_t** out, size_t* size) {
  return guarded([&] {
    Quiet quiet;
    if (!store->tcp->check({std::string(key)})) {
      return;
    }
    const auto value = store->tcp->get(key);
    *out = static_cast<uint8_t*>(malloc(value.size() + 1));
    std::copy(value.begin(), value.end(), *out);
    *size = value.size();
  });
}

char* tangelo_store_wait(Store* store, const char* key, int64_t timeout_ms) {
  return guarded([&] {
    Quiet quiet;
    store->tcp->wait({std::string(key)}, milliseconds(timeout_ms));
  });
}

char* tangelo_store_add(Store* store, const char* key, int64_t amount, int64_t* out) {
  return guarded([&] { *out = store->tcp->add(key, amount); });
}

char* tangelo_store_delete(Store* store, const char* key) {
  return guarded([&] { store->tcp->deleteKey(key); });
}

// `interface` names a network interface; where it is empty, `host` names an address of this machine.
char* tangelo_gloo_connect(
    Store* store,
    const char* prefix,
    int rank,
    int size,
    const char* interface,
    const char* host,
    int64_t timeout_ms,
    Mesh** out) {
  return guarded([&] {
    auto options = ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    // Worker threads serve collectives only, and we use messages alone.
    options->threads = 1;
    options->devices.push_back(
        *interface ? ProcessGroupGloo::createDeviceForInterface(interface)
                   : ProcessGroupGloo::createDeviceForHostname(host));
    auto prefixed = c10::make_intrusive<c10d::PrefixStore>(prefix, store->tcp);
    auto mesh = std::make_unique<Mesh>();
    mesh->group = c10::make_intrusive<ProcessGroupGloo>(prefixed, rank, size, options);
    *out = mesh.release();
  });
}

// Ends all works and closes the connections, so that peers see this rank leave: at once, or when the last work that
// another thread still has is freed, since works hold Gloo's transport context, which owns the connections.
void tangelo_gloo_hang_up(Mesh* mesh) {
  guarded([&] {
    c10::intrusive_ptr<ProcessGroupGloo> group;
    std::lock_guard<std::mutex> starting(mesh->starting);
    std::lock_guard<std::mutex> lock(mesh->mutex);
    abort_all(mesh);
    group = std::move(mesh->group);
  });
}

void tangelo_gloo_close(Mesh* mesh) {
  guarded([&] { delete mesh; });
}

// The bytes must stay where they are until the work is freed; a receive writes at most `size` of them.
char* tangelo_gloo_start(Mesh* mesh, bool receive, int peer, int slot, void* data, size_t size, Work** out) {
  return guarded([&] {
    std::lock_guard<std::mutex> starting(mesh->starting);
    if (!mesh->group) {
      throw std::runtime_error("this rank closed its connections after a failure");
    }
    std::vector<at::Tensor> tensors{bytes_tensor(data, size)};
    auto work = receive ? mesh->group->recv(tensors, peer, slot) : mesh->group->send(tensors, peer, slot);
    auto handle = std::make_unique<Work>(Work{work});
    std::lock_guard<std::mutex> lock(mesh->mutex);
    mesh->running.insert(work.get());
    if (mesh->aborted) {
      work->abort();
    }
    *out = handle.release();
  });
}

// `*done` is false where the mesh was aborted. After an error of any kind the mesh is of no more use.
char* tangelo_gloo_wait(Work* work, int64_t timeout_ms, bool* done) {
  return guarded([&] { *done = work->work->wait(milliseconds(std::max<int64_t>(timeout_ms, 1))); });
}

void tangelo_gloo_free(Mesh* mesh, Work* work) {
  guarded([&] {
    {
      std::lock_guard<std::mutex> lock(mesh->mutex);
      mesh->running.erase(work->work.get());
    }
    delete work;
  });
}

// From any thread: ends the waits of now and of later.
void tangelo_gloo_abort(Mesh* mesh) {
  guarded([&] {
    std::lock_guard<std::mutex> lock(mesh->mutex);
    abort_all(mesh);
  });
}

} // extern "C"
