// New tensors, made in the library of a borrowed one (torch), for one call's results.
//
// Small results on the CPU share one allocation of ours with a shared count, which costs half of what torch.empty does.
// Large ones, and all on CUDA, come from the library's own allocator, so that its caching, streams and graph capture
// hold. All are 64-byte aligned. Needs the GIL, except for the release of a block, which may happen on any thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "tensor.h"

namespace pyppo {

// OutputBlock out(values); int a = out.add(kFloat32, {T, N}), b = ...; out.allocate(); write out.data(a); out.take(a).
// What is not taken is freed.
class OutputBlock {
 public:
  explicit OutputBlock(const Tensor& like) : api_(like.api), device_(like.device) {
    if (!api_) detail::fail_type(like.name, "is an array without an allocator", "be a torch tensor, or give `out`");
  }
  OutputBlock(const OutputBlock&) = delete;
  OutputBlock& operator=(const OutputBlock&) = delete;
  ~OutputBlock() {
    for (int i = 0; i < count_; ++i)
      if (managed_[i]) managed_[i]->deleter(managed_[i]);
  }

  int add(DLDataType dtype, int ndim, const int64_t* shape) {
    if (count_ == kMaxTensors || dims_ + ndim > kMaxDims) throw std::logic_error("OutputBlock is full");
    DLTensor& t = tensors_[count_];
    t = {nullptr, device_, ndim, dtype, shape_ + dims_, strides_ + dims_, 0};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      t.shape[i] = shape[i];
      t.strides[i] = stride;
      stride *= shape[i] ? shape[i] : 1;
    }
    dims_ += ndim;
    return count_++;
  }
  int add(DLDataType dtype, std::initializer_list<int64_t> shape) {
    return add(dtype, static_cast<int>(shape.size()), shape.begin());
  }

  void allocate() {
    size_t meta = sizeof(Header), data = 0;
    int users = 0;
    for (int i = 0; i < count_; ++i) {
      if (!is_shared(i)) {
        managed_[i] = allocate_one(tensors_[i]);
        continue;
      }
      meta += slot_bytes(tensors_[i]);
      data += data_bytes(tensors_[i]);
      ++users;
    }
    if (users) fill_block(users, meta, data);
  }

  void* data(int i) const { return managed_[i]->tensor.data; }
  template <class T>
  T* data(int i) const {
    return static_cast<T*>(data(i));
  }

  // A new reference to result i; once each.
  PyObject* take(int i) {
    void* object = nullptr;
    if (api_->managed_to_object(std::exchange(managed_[i], nullptr), &object)) throw PythonError();
    return static_cast<PyObject*>(object);
  }

 private:
  static constexpr int kMaxTensors = 8, kMaxDims = 8 * 64;
  static constexpr size_t kAlign = 64;
  // Larger results are allocated apart: keeping a scalar loss must not keep a large gradient.
  static constexpr size_t kShareBelow = 8192;

  struct alignas(8) Header {
    std::atomic<int> users;
  };
  using Slot = DLManagedTensorVersioned;  // in the block, each followed by its shape and strides

  static constexpr size_t round_up(size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
  static size_t data_bytes(const DLTensor& t) {
    size_t n = t.dtype.bits / 8;
    for (int i = 0; i < t.ndim; ++i) n *= static_cast<size_t>(t.shape[i]);
    return round_up(n ? n : 1);
  }
  static size_t slot_bytes(const DLTensor& t) { return sizeof(Slot) + 2 * t.ndim * sizeof(int64_t); }
  bool is_shared(int i) const { return device_.type == kDLCPU && data_bytes(tensors_[i]) <= kShareBelow; }

  static void release(DLManagedTensorVersioned* managed) {
    auto* header = static_cast<Header*>(managed->context);
    if (header->users.fetch_sub(1, std::memory_order_acq_rel) == 1) std::free(header);
  }

  void fill_block(int users, size_t meta, size_t data) {
    // malloc keeps freed blocks of this size at hand, aligned_alloc does not
    void* memory = std::malloc(meta + data + kAlign - 1);
    if (!memory) throw std::bad_alloc();
    auto* header = new (memory) Header{{users}};
    char* slot_at = static_cast<char*>(memory) + sizeof(Header);
    char* data_at = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(memory) + meta));
    for (int i = 0; i < count_; ++i) {
      if (!is_shared(i)) continue;
      const DLTensor& t = tensors_[i];
      auto* shape = reinterpret_cast<int64_t*>(slot_at + sizeof(Slot));
      std::copy_n(t.shape, t.ndim, shape);
      std::copy_n(t.strides, t.ndim, shape + t.ndim);
      managed_[i] =
          new (slot_at) Slot{{1, 0}, header, release, 0, {data_at, device_, t.ndim, t.dtype, shape, shape + t.ndim, 0}};
      slot_at += slot_bytes(t);
      data_at += data_bytes(t);
    }
  }

  DLManagedTensorVersioned* allocate_one(DLTensor& prototype) {
    DLManagedTensorVersioned* managed = nullptr;
    std::string error;
    auto set_error = [](void* context, const char* kind, const char* message) {
      *static_cast<std::string*>(context) = std::string(kind) + ": " + message;
    };
    if (api_->allocate(&prototype, &managed, &error, set_error)) throw std::runtime_error(error);
    return managed;
  }

  const DLExchangeAPI* api_;
  DLDevice device_;
  int count_ = 0, dims_ = 0;
  DLTensor tensors_[kMaxTensors];
  DLManagedTensorVersioned* managed_[kMaxTensors] = {};
  int64_t shape_[kMaxDims], strides_[kMaxDims];
};

}  // namespace pyppo
