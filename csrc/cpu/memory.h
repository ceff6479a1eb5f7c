// Scratch memory of a kernel, and stores that pass the cache by.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

// A 64-byte aligned array, uninitialised. Small ones lie in the object itself: an allocation costs as much as a small
// call's arithmetic.
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count)
      : data_(static_cast<T*>(count * sizeof(T) <= sizeof(small_) ? small_ : allocate_scratch(count * sizeof(T)))) {}
  ~Scratch() {
    if (data_ != static_cast<void*>(small_)) free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
  alignas(64) unsigned char small_[4096];
};

// Copies without reading the destination's cache lines first: for output larger than the caches. A fence must follow.
inline void stream_copy(void* to, const void* from, size_t bytes) {
#if defined(__AVX2__) || defined(__SSE2__)
  char* destination = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  size_t head = size_t(-reinterpret_cast<intptr_t>(destination)) & 63;
  head = head < bytes ? head : bytes;
  memcpy(destination, source, head);
  size_t i = head;
#if defined(__AVX512F__)
  for (; i + 64 <= bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + i), _mm512_loadu_si512(source + i));
#elif defined(__AVX2__)
  for (; i + 32 <= bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(destination + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#else
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(destination + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
#endif
  memcpy(destination + i, source + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

inline void stream_fence() {
#if defined(__AVX2__) || defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace pyppo::cpu
