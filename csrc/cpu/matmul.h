// Matrix products of dense layers over blocks of L samples that lie side by side in vector lanes: activations are
// [features][L], weights [outputs, inputs] as torch keeps them. An output is one chain of multiply-adds over its
// inputs, in order, whatever the tile it is computed in: a row's result does not depend on the rows around it.
#pragma once

#include <stdint.h>
#include <string.h>

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

// The widest vectors of this instruction set, and how many accumulators of them leave registers for the operands.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int accumulators = 24;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int accumulators = 12;
#else
constexpr int vector_bytes = 16;
constexpr int accumulators = 10;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int vector_lanes = vector_bytes / int(sizeof(T));

template <class T>
inline __attribute__((always_inline)) Vector<T> load_vector(const T* from) {
  Vector<T> v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline __attribute__((always_inline)) void store_vector(T* to, const Vector<T>& v) {
  memcpy(to, &v, sizeof(v));
}

// Calls f(m, n) for all accumulators. Unrolled, or they would not stay in registers.
template <int M, int N, class F>
inline __attribute__((always_inline)) void for_accumulators(const F& f) {
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) f(m, n);
}

// acc[m][n] += sum over d of a[m row + d step] * (vector n of b[d stride]).
template <int M, int N, class T>
inline __attribute__((always_inline)) void multiply_add(Vector<T> (&acc)[M][N], const T* a, int64_t row, int64_t step,
                                                        const T* b, int64_t stride, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d) {
    Vector<T> columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = load_vector(b + d * stride + n * vector_lanes<T>);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const T factor = a[m * row + d * step];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += factor * columns[n];
    }
  }
}

template <int M>
struct Rows {
  static constexpr int count = M;
};

// Calls tile(Rows<M>, first) over [begin, end): as many rows at once as fit with N vectors each, then what is left.
template <int M, class F>
inline __attribute__((always_inline)) void last_rows(int64_t first, int64_t left, const F& tile) {
  if constexpr (M > 0) {
    if (left == M)
      tile(Rows<M>(), first);
    else
      last_rows<M - 1>(first, left, tile);
  }
}

template <int N, class F>
inline void for_row_tiles(int64_t begin, int64_t end, const F& tile) {
  constexpr int most = accumulators / N;
  int64_t first = begin;
  for (; first + most <= end; first += most) tile(Rows<most>(), first);
  last_rows<most - 1>(first, end - first, tile);
}

// Calls panel(N, v) over `vectors` vectors, two at once, then the last alone.
template <class F>
inline void for_panels(int vectors, const F& panel) {
  int v = 0;
  for (; v + 2 <= vectors; v += 2) panel(Rows<2>(), v);
  if (v < vectors) panel(Rows<1>(), v);
}

// y [outputs][L] = weight x + bias over the first `vectors` vectors of lanes.
template <int L, class T>
void dense_forward(const T* weight, const T* bias, int64_t inputs, int64_t outputs, const T* x, T* y, int vectors) {
  for_panels(vectors, [&](auto panel, int v) {
    constexpr int N = decltype(panel)::count;
    const int64_t lane = int64_t(v) * vector_lanes<T>;
    for_row_tiles<N>(0, outputs, [&](auto rows, int64_t j) {
      constexpr int M = decltype(rows)::count;
      Vector<T> acc[M][N];
      for_accumulators<M, N>([&](int m, int n) { acc[m][n] = Vector<T>{} + bias[j + m]; });
      multiply_add<M, N>(acc, weight + j * inputs, inputs, 1, x + lane, L, inputs);
      for_accumulators<M, N>(
          [&](int m, int n) { store_vector(y + (j + m) * L + lane + n * vector_lanes<T>, acc[m][n]); });
    });
  });
}

// dx [inputs][L] = transposed weight times dy, plus what dx holds where `accumulate`.
template <int L, class T>
void dense_backward(const T* weight, int64_t inputs, int64_t outputs, const T* dy, T* dx, int vectors,
                    bool accumulate) {
  for_panels(vectors, [&](auto panel, int v) {
    constexpr int N = decltype(panel)::count;
    const int64_t lane = int64_t(v) * vector_lanes<T>;
    for_row_tiles<N>(0, inputs, [&](auto rows, int64_t k) {
      constexpr int M = decltype(rows)::count;
      T* out = dx + k * L + lane;
      Vector<T> acc[M][N];
      if (accumulate)
        for_accumulators<M, N>([&](int m, int n) { acc[m][n] = load_vector(out + m * L + n * vector_lanes<T>); });
      else
        for_accumulators<M, N>([&](int m, int n) { acc[m][n] = Vector<T>{}; });
      multiply_add<M, N>(acc, weight + k, 1, inputs, dy + lane, L, outputs);
      for_accumulators<M, N>([&](int m, int n) { store_vector(out + m * L + n * vector_lanes<T>, acc[m][n]); });
    });
  });
}

// A wide layer's weights are read from a copy: tiles of rows, a tile's columns after one another, the last tile filled
// up with zeros. From the matrix itself a tile's rows are a power of two apart, and few of them fit into the cache at
// once; the transposed product would use a part of each line it fetches.
constexpr int packed_rows = accumulators / 2;

inline int64_t packed_tiles(int64_t rows) { return (rows + packed_rows - 1) / packed_rows; }

// The tiles [begin, end) of a matrix [rows, columns] whose elements are `row` and `column` apart.
template <class T>
void pack_tiles(const T* matrix, int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                T* packed) {
  constexpr int64_t run = 8;  // columns at a time: of a transposed matrix, lines that the next tile wants too
  for (int64_t k = 0; k < columns; k += run)
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * packed_rows, last = k + run < columns ? k + run : columns;
      const T* from = matrix + first * row;
      T* to = packed + first * columns;
      if (rows - first >= packed_rows)
        for (int64_t c = k; c < last; ++c)
          for (int m = 0; m < packed_rows; ++m) to[c * packed_rows + m] = from[m * row + c * column];
      else
        for (int64_t c = k; c < last; ++c)
          for (int m = 0; m < packed_rows; ++m)
            to[c * packed_rows + m] = m < rows - first ? from[m * row + c * column] : T(0);
    }
}

// y [rows][L] = bias + matrix x over the first `vectors` vectors of lanes, from the matrix's packed tiles. No bias: 0,
// or what y holds where `accumulate`.
template <int L, class T>
void dense_packed(const T* packed, const T* bias, int64_t columns, int64_t rows, const T* x, T* y, int vectors,
                  bool accumulate) {
  constexpr int M = packed_rows;
  for (int64_t j = 0; j < rows; j += M) {
    const int64_t left = rows - j;
    for_panels(vectors, [&](auto panel, int v) {
      constexpr int N = decltype(panel)::count;
      const int64_t lane = int64_t(v) * vector_lanes<T>;
      T* out = y + j * L + lane;
      Vector<T> acc[M][N];
      for_accumulators<M, N>([&](int m, int n) {
        acc[m][n] = Vector<T>{};
        if (m >= left) return;
        if (bias != nullptr) acc[m][n] += bias[j + m];
        if (accumulate) acc[m][n] = load_vector(out + m * L + n * vector_lanes<T>);
      });
      multiply_add<M, N>(acc, packed + j * columns, 1, M, x + lane, L, columns);
      for_accumulators<M, N>([&](int m, int n) {
        if (m < left) store_vector(out + m * L + n * vector_lanes<T>, acc[m][n]);
      });
    });
  }
}

template <class T>
inline size_t bytes_within(int n, int64_t width) {
  const int64_t left = width - n * vector_lanes<T>;
  return left <= 0 ? 0 : sizeof(T) * size_t(left < vector_lanes<T> ? left : vector_lanes<T>);
}

// Vector n of a row, as much of it as lies within the row's width.
template <class T>
inline void store_first(T* row, int n, int64_t width, const Vector<T>& v) {
  memcpy(row + n * vector_lanes<T>, &v, bytes_within<T>(n, width));
}

template <class T>
inline Vector<T> load_first(const T* row, int n, int64_t width) {
  Vector<T> v = {};
  memcpy(&v, row + n * vector_lanes<T>, bytes_within<T>(n, width));
  return v;
}

// Samples of a dense layer's inputs as its weight gradient reads them: in panels of two vectors of columns, a panel's
// samples after one another. Samples `inputs` apart would, where that is a power of two, share a few sets of the cache.
template <class T>
constexpr int panel_columns = 2 * vector_lanes<T>;

template <class T>
struct Panel {
  T* first;       // of the panel's first sample
  int64_t width;  // its columns; samples are as far apart
};

// The panel of column k, the first of its panel, of x [capacity, inputs].
template <class T>
inline Panel<T> panel_at(T* x, int64_t capacity, int64_t inputs, int64_t k) {
  return {x + k * capacity, inputs - k < panel_columns<T> ? inputs - k : panel_columns<T>};
}

// Rows [begin, end) of d_weight [outputs, inputs] and d_bias, summed over all samples in order.
//   x: panels of [capacity, inputs], readable for a vector beyond their end; dy [outputs][L] in each block of samples,
//   `block_stride` apart.
template <int L, class T>
void weight_gradient(const T* x, int64_t capacity, const T* dy, int64_t block_stride, int64_t batch, int64_t inputs,
                     int64_t begin, int64_t end, T* d_weight, T* d_bias) {
  constexpr int64_t part = 8;  // blocks whose samples of a panel stay in the first cache while the rows go by
  const int64_t blocks = (batch + L - 1) / L;
  const int vectors = int((inputs + vector_lanes<T> - 1) / vector_lanes<T>);
  for (int64_t first = 0; first < blocks; first += part) {
    const int64_t last = first + part < blocks ? first + part : blocks;
    for_panels(vectors, [&](auto columns, int v) {
      constexpr int N = decltype(columns)::count;
      const int64_t k = int64_t(v) * vector_lanes<T>;
      const Panel<const T> panel = panel_at(x, capacity, inputs, k);
      const bool whole = panel.width >= N * vector_lanes<T>;
      for_row_tiles<N>(begin, end, [&](auto rows, int64_t j) {
        constexpr int M = decltype(rows)::count;
        T* out = d_weight + j * inputs + k;
        Vector<T> acc[M][N];
        if (first == 0)
          for_accumulators<M, N>([&](int m, int n) { acc[m][n] = Vector<T>{}; });
        else if (whole)
          for_accumulators<M, N>(
              [&](int m, int n) { acc[m][n] = load_vector(out + m * inputs + n * vector_lanes<T>); });
        else
          for_accumulators<M, N>([&](int m, int n) { acc[m][n] = load_first(out + m * inputs, n, panel.width); });
        for (int64_t b = first; b < last; ++b) {
          const int64_t count = batch - b * L < L ? batch - b * L : L;
          multiply_add<M, N>(acc, dy + b * block_stride + j * L, L, 1, panel.first + b * L * panel.width, panel.width,
                             count);
        }
        if (whole)
          for_accumulators<M, N>(
              [&](int m, int n) { store_vector(out + m * inputs + n * vector_lanes<T>, acc[m][n]); });
        else
          for_accumulators<M, N>([&](int m, int n) { store_first(out + m * inputs, n, panel.width, acc[m][n]); });
      });
    });
  }
  for (int64_t j = begin; j < end; ++j) {
    Vector<T> sums = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t count = batch - b * L < L ? batch - b * L : L;
      const T* lanes = dy + b * block_stride + j * L;
      for (int64_t i = 0; i < count; i += vector_lanes<T>) sums += load_vector(lanes + i);
    }
    T lanes[vector_lanes<T>];
    store_vector(lanes, sums);
    for (int half = vector_lanes<T> / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    d_bias[j] = lanes[0];
  }
}

}  // namespace
}  // namespace pyppo::cpu
