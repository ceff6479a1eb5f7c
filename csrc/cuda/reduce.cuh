// Sums by fixed trees: the same bits at each launch, since no thread's turn decides the order. And who is last.
#pragma once

#include "device.cuh"

namespace pyppo::cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// In every lane the same bits: a + b is b + a, so both halves of a butterfly agree.
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(all_lanes, x, offset);
  return x;
}

template <class T>
__device__ inline T warp_max(T x) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(all_lanes, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// Sums K numbers over a block of `threads` threads, at most max_threads, all of which get the sums. Every thread of the
// block must call it.
template <int max_threads, int K>
__device__ inline void block_sum(double (&x)[K], int threads) {
  constexpr int max_warps = max_threads / warp_size;
  static_assert(max_threads % warp_size == 0 && max_warps <= warp_size, "whole warps, and one warp's worth of them");
  __shared__ double partial[K][max_warps];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, warps = threads / warp_size;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const double sum = warp_sum(x[k]);
    if (lane == 0) partial[k][warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(lane < warps ? partial[k][lane] : 0.0);
  __syncthreads();  // the next call writes `partial` again
}

// Whether this block is the last one of its launch to come here. To it, all that any block wrote to global memory
// before is visible, read by `other_blocks`. Every thread of the block must call it, at the kernel's end. Which block
// is last decides nothing but who goes on: it must not show in what that one computes.
__device__ inline bool last_block(unsigned* arrivals) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    if (last) *arrivals = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// From the cache that all multiprocessors share: the nearer one may hold what was there before.
__device__ inline double other_blocks(const double* x) { return __ldcg(x); }

template <int threads, int K>
__device__ inline void block_sum(double (&x)[K]) {
  block_sum<threads>(x, threads);
}

}  // namespace pyppo::cuda
