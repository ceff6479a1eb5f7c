// Tiles: samples side by side in vector lanes, one array of lanes for each action or dimension ("action-major"), so that
// every formula is applied to whole vectors. Rows beyond a tile's end are zeros, and their weight is 0.
#pragma once

#include <stdint.h>

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

// Lanes of a tile. Every loop runs over all of them: a constant, and a multiple of the widest vector.
#define PYPPO_LANES(i) _Pragma("GCC ivdep") for (int i = 0; i < L; ++i)

// rows [n, width] to tile [width][L].
template <int L, class T, class From>
inline void load_tile(T* __restrict tile, const From* __restrict rows, int n, int64_t width) {
  if (n < 0 || n > L) __builtin_unreachable();
  if (n == L && width == 1) {
    PYPPO_LANES(i) tile[i] = T(rows[i]);
    return;
  }
  if (n == L) {
    for (int64_t j = 0; j < width; ++j)
      PYPPO_LANES(i) tile[j * L + i] = T(rows[i * width + j]);
    return;
  }
  for (int64_t j = 0; j < width; ++j) {
    for (int i = 0; i < n; ++i) tile[j * L + i] = T(rows[i * width + j]);
    for (int i = n; i < L; ++i) tile[j * L + i] = T(0);
  }
}

// tile [width][L] to rows [n, width].
template <int L, class T, class To>
inline void store_tile(To* __restrict rows, const T* __restrict tile, int n, int64_t width) {
  for (int i = 0; i < n; ++i)
    for (int64_t j = 0; j < width; ++j) rows[i * width + j] = To(tile[j * L + i]);
}

// The rows of a tile: rows [first, first + count) of the batch, of which the live ones count.
template <int L>
struct TileRows {
  int64_t first;
  int count;
  uint8_t live[L];
  bool all_live;
};

template <int L>
inline TileRows<L> rows_from(int64_t first, int64_t end) {
  TileRows<L> rows;
  rows.first = first;
  rows.count = end - first < L ? int(end - first) : L;
  for (int i = 0; i < L; ++i) rows.live[i] = i < rows.count;
  rows.all_live = rows.count == L;
  return rows;
}

// Whatever a row without weight holds, it computes as zeros.
template <int L, class T>
inline void clear_dead(T* __restrict tile, const TileRows<L>& rows, int64_t width) {
  if (rows.all_live) return;
  for (int64_t j = 0; j < width; ++j)
    PYPPO_LANES(i) tile[j * L + i] = rows.live[i] ? tile[j * L + i] : T(0);
}

// The sum of the lanes, by a fixed tree.
template <int L, class T>
inline double sum_lanes(const T* lanes) {
  double sums[L];
  for (int i = 0; i < L; ++i) sums[i] = double(lanes[i]);
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// Integer actions of any size, as int32: a value that does not fit becomes -1, which no action is.
template <int L>
inline void load_actions(int32_t* tile, const void* actions, int bytes, const TileRows<L>& rows, int64_t width) {
  for (int64_t j = 0; j < width; ++j)
    for (int i = 0; i < L; ++i) {
      int64_t value = 0;
      if (rows.live[i]) {
        const int64_t at = (rows.first + i) * width + j;
        value = bytes == 8   ? static_cast<const int64_t*>(actions)[at]
                : bytes == 4 ? static_cast<const int32_t*>(actions)[at]
                             : static_cast<const uint8_t*>(actions)[at];
      }
      tile[j * L + i] = value < 0 || value > INT32_MAX ? -1 : int32_t(value);
    }
}

inline void note_row(int64_t& noted, int64_t row) {
  if (noted < 0 || row < noted) noted = row;
}

}  // namespace
}  // namespace pyppo::cpu
