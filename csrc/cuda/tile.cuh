// Who works on a row of a [B, width] array, and the tiles of rows that a block stages in shared memory.
//
// Narrow rows: global memory is read in order into a tile, then each thread has a row of its own there. Wide rows: a
// warp has a row, its lanes side by side over the columns, and global memory is read in order anyway.
#pragma once

#include "reduce.cuh"

namespace pyppo::cuda {

// The threads that share a row.
struct OneThread {
  static constexpr int size = 1;
  __device__ static int lane() { return 0; }
  template <class T>
  __device__ static T sum(T x) {
    return x;
  }
  template <class T>
  __device__ static T max(T x) {
    return x;
  }
  template <class T>
  __device__ static T from(T x, int) {
    return x;
  }
};

struct Warp {
  static constexpr int size = warp_size;
  __device__ static int lane() { return threadIdx.x % warp_size; }
  template <class T>
  __device__ static T sum(T x) {
    return warp_sum(x);
  }
  template <class T>
  __device__ static T max(T x) {
    return warp_max(x);
  }
  // The value that another lane holds.
  template <class T>
  __device__ static T from(T x, int lane) {
    return __shfl_sync(all_lanes, x, lane);
  }
};

// Some slots of [rows, width] in shared memory, each row an odd number of elements apart, so that threads that read one
// column of 32 rows meet 32 different banks.
template <class T>
struct Tile {
  T* data;
  int rows, width;

  __host__ __device__ static int stride(int width) { return width | 1; }
  static size_t bytes(int slots, int rows, int width) { return sizeof(T) * size_t(slots) * rows * stride(width); }

  __device__ T* row(int slot, int r) const { return data + (slot * rows + r) * stride(width); }

  // Calls f(row, column, element) for the elements of the first `count` rows, in memory's order over the block.
  template <class F>
  __device__ void for_each(int count, F&& f) const {
    int element = threadIdx.x, r = element / width, column = element % width;
    const int row_step = blockDim.x / width, column_step = blockDim.x % width;
    for (; element < count * width; element += blockDim.x) {
      f(r, column, element);
      r += row_step;
      column += column_step;
      if (column >= width) {
        column -= width;
        ++r;
      }
    }
  }

  // load(element) of a row-major array goes into a slot.
  template <class Load>
  __device__ void fill(int slot, int count, Load&& load) const {
    for_each(count, [&](int r, int column, int element) { row(slot, r)[column] = load(element); });
  }

  template <class To>
  __device__ void store(int slot, int count, To* to) const {
    for_each(count, [&](int r, int column, int element) { to[element] = To(row(slot, r)[column]); });
  }
};

// The block's dynamic shared memory.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ double shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

// Rows a tile can hold: as many as the block has threads, or fewer where they would crowd out other blocks. 0: too
// wide.
template <class T>
int tile_rows(int threads, int slots, int64_t width, int64_t max_width) {
  constexpr size_t comfortable = 24 << 10, limit = 47 << 10;  // of 48 KiB; the rest is for what sums over blocks
  if (width > max_width) return 0;
  for (int rows = threads; rows > warp_size; rows /= 2)
    if (Tile<T>::bytes(slots, rows, int(width)) <= comfortable) return rows;
  return Tile<T>::bytes(slots, warp_size, int(width)) <= limit ? warp_size : 0;
}

}  // namespace pyppo::cuda
