// Tiles: samples side by side in vector lanes, one array of lanes for each action or dimension ("action-major"), so
// that every formula is applied to whole vectors. Rows beyond a tile's end are zeros, and their weight is 0.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

// Lanes of a tile. Every loop runs over all of them: a constant, and a multiple of the widest vector.
#define PYPPO_LANES(i) _Pragma("GCC ivdep") for (int i = 0; i < L; ++i)

template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

// A whole tile of a width the compiler knows: its loads and stores become shuffles of whole vectors.
template <int L, int width, class T, class From>
inline void transpose_in(T* __restrict tile, const From* __restrict rows) {
  PYPPO_LANES(i)
  for (int j = 0; j < width; ++j) tile[j * L + i] = T(rows[i * width + j]);
}

template <int L, int width, class T, class To>
inline void transpose_out(To* __restrict rows, const T* __restrict tile) {
  PYPPO_LANES(i)
  for (int j = 0; j < width; ++j) rows[i * width + j] = To(tile[j * L + i]);
}

#if defined(__AVX2__)
// Any other width of floats goes through registers in blocks of eight rows by eight columns: four to six times as fast
// as one element at a time, and transposing is half of a loss kernel's work.
inline void transpose_8x8(__m256 (&r)[8]) {
  __m256 pairs[8], quads[8];
  for (int k = 0; k < 4; ++k) {
    pairs[2 * k] = _mm256_unpacklo_ps(r[2 * k], r[2 * k + 1]);
    pairs[2 * k + 1] = _mm256_unpackhi_ps(r[2 * k], r[2 * k + 1]);
  }
  for (int k = 0; k < 8; k += 4)
    for (int m = 0; m < 2; ++m) {
      quads[k + 2 * m] = _mm256_shuffle_ps(pairs[k + m], pairs[k + m + 2], 0x44);
      quads[k + 2 * m + 1] = _mm256_shuffle_ps(pairs[k + m], pairs[k + m + 2], 0xee);
    }
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm256_permute2f128_ps(quads[k], quads[k + 4], 0x20);
    r[k + 4] = _mm256_permute2f128_ps(quads[k], quads[k + 4], 0x31);
  }
}

// The first column of the eight-column block that begins at j: the last block overlaps the one before.
inline int64_t block_column(int64_t j, int64_t width) { return width >= 8 && j + 8 > width ? width - 8 : j; }

template <int L>
inline void load_blocks(float* __restrict tile, const float* __restrict rows, int64_t width) {
  const int columns = width < 8 ? int(width) : 8;
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(columns), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  for (int i = 0; i < L; i += 8)
    for (int64_t next = 0; next < width; next += 8) {
      const int64_t j = block_column(next, width);
      __m256 block[8];
      for (int k = 0; k < 8; ++k) block[k] = _mm256_maskload_ps(rows + (i + k) * width + j, mask);
      transpose_8x8(block);
      for (int k = 0; k < columns; ++k) _mm256_store_ps(tile + (j + k) * L + i, block[k]);
    }
}

template <int L>
inline void store_blocks(float* __restrict rows, const float* __restrict tile, int64_t width) {
  const int columns = width < 8 ? int(width) : 8;
  for (int i = 0; i < L; i += 8)
    for (int64_t next = 0; next < width; next += 8) {
      const int64_t j = block_column(next, width);
      __m256 block[8];
      for (int k = 0; k < 8; ++k) block[k] = k < columns ? _mm256_load_ps(tile + (j + k) * L + i) : _mm256_setzero_ps();
      transpose_8x8(block);
      // A narrow row's eight floats spill into the next row, which is written after it; the tile's last must not.
      const int whole = width < 8 && i + 8 == L ? 7 : 8;
      for (int k = 0; k < whole; ++k) _mm256_storeu_ps(rows + (i + k) * width + j, block[k]);
      if (whole == 8) continue;
      alignas(32) float last[8];
      _mm256_store_ps(last, block[7]);
      for (int c = 0; c < columns; ++c) rows[(L - 1) * width + c] = last[c];
    }
}
#else
template <int L>
inline void load_blocks(float* __restrict tile, const float* __restrict rows, int64_t width) {
  for (int i = 0; i < L; ++i)
    for (int64_t j = 0; j < width; ++j) tile[j * L + i] = rows[i * width + j];
}

template <int L>
inline void store_blocks(float* __restrict rows, const float* __restrict tile, int64_t width) {
  for (int i = 0; i < L; ++i)
    for (int64_t j = 0; j < width; ++j) rows[i * width + j] = tile[j * L + i];
}
#endif

// rows [n, width] to tile [width][L]; the tile is 32-byte aligned.
template <int L, class T, class From>
inline void load_tile(T* __restrict tile, const From* __restrict rows, int n, int64_t width) {
  if (n < 0 || n > L) __builtin_unreachable();
  if (n == L && width == 1) return transpose_in<L, 1>(tile, rows);
  if (n == L && width == 2) return transpose_in<L, 2>(tile, rows);
  if constexpr (is_float<T> && is_float<From>)
    if (n == L) return load_blocks<L>(tile, rows, width);
  for (int i = 0; i < n; ++i)
    for (int64_t j = 0; j < width; ++j) tile[j * L + i] = T(rows[i * width + j]);
  if (n == L) return;
  for (int64_t j = 0; j < width; ++j)
    for (int i = n; i < L; ++i) tile[j * L + i] = T(0);
}

// tile [width][L] to rows [n, width].
template <int L, class T, class To>
inline void store_tile(To* __restrict rows, const T* __restrict tile, int n, int64_t width) {
  if (n == L && width == 1) return transpose_out<L, 1>(rows, tile);
  if (n == L && width == 2) return transpose_out<L, 2>(rows, tile);
  if constexpr (is_float<T> && is_float<To>)
    if (n == L) return store_blocks<L>(rows, tile, width);
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
  for (int64_t j = 0; j < width; ++j) PYPPO_LANES(i) tile[j * L + i] = rows.live[i] ? tile[j * L + i] : T(0);
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

// Integer actions [count, width] as int32 [width][L]; one that does not fit becomes -1, which no action is. Dead lanes
// become 0.
template <int L, class Integer>
inline void load_integers(int32_t* __restrict tile, const Integer* __restrict actions, const TileRows<L>& rows,
                          int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    int32_t* __restrict lanes = tile + j * L;
    if (rows.count == L && width == 1) {  // one action a sample: whole vectors
      PYPPO_LANES(i) lanes[i] = actions[i] == Integer(int32_t(actions[i])) ? int32_t(actions[i]) : -1;
    } else if (rows.count == L) {
      PYPPO_LANES(i)
      lanes[i] = int32_t(
          actions[i * width + j] == Integer(int32_t(actions[i * width + j])) ? int32_t(actions[i * width + j]) : -1);
    } else {
      for (int i = 0; i < L; ++i) {
        const Integer action = i < rows.count ? actions[i * width + j] : Integer(0);
        lanes[i] = action == Integer(int32_t(action)) ? int32_t(action) : -1;
      }
    }
    if (!rows.all_live) PYPPO_LANES(i) lanes[i] = rows.live[i] ? lanes[i] : 0;
  }
}

template <int L>
inline void load_actions(int32_t* tile, const void* actions, int bytes, const TileRows<L>& rows, int64_t width) {
  const int64_t offset = rows.first * width;
  if (bytes == 8)
    load_integers<L>(tile, static_cast<const int64_t*>(actions) + offset, rows, width);
  else if (bytes == 4)
    load_integers<L>(tile, static_cast<const int32_t*>(actions) + offset, rows, width);
  else
    load_integers<L>(tile, static_cast<const uint8_t*>(actions) + offset, rows, width);
}

// Whether some lane of `action` is outside [0, count). Dead lanes hold 0.
template <int L>
inline bool any_outside(const int32_t* __restrict action, int32_t count) {
  uint32_t outside = 0;
  PYPPO_LANES(i) outside |= uint32_t(uint32_t(action[i]) >= uint32_t(count));
  return outside != 0;
}

inline void note_row(int64_t& noted, int64_t row) {
  if (noted < 0 || row < noted) noted = row;
}

}  // namespace
}  // namespace pyppo::cpu
