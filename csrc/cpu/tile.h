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

// For loops over columns: calls f(run, j) for runs of `run.columns` columns from j on that cover [first, end). Written
// out for every column of a run, a loop over lanes keeps what it adds up in registers meanwhile.
template <int n>
struct Run {
  static constexpr int columns = n;
};

template <class F>
inline void for_runs(int64_t first, int64_t end, F&& f) {
  int64_t j = first;
  for (; j + 4 <= end; j += 4) f(Run<4>(), j);
  if (j + 2 <= end) {
    f(Run<2>(), j);
    j += 2;
  }
  if (j < end) f(Run<1>(), j);
}

// Calls f(c) for each column of a run, inlined, within a loop over lanes: compilers unroll loops there too late.
#define PYPPO_INLINE __attribute__((always_inline))
template <int n, class F>
PYPPO_INLINE inline void for_columns(Run<n>, F&& f) {
  if constexpr (n > 1) for_columns(Run<n - 1>(), f);
  f(n - 1);
}

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
// Floats go through registers: four to six times as fast as one element at a time, and transposing is half of a loss
// kernel's work. Within each half of eight registers, 4 x 4 floats change places.
inline void transpose_4x4(__m256& a, __m256& b, __m256& c, __m256& d) {
  const __m256 ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
  const __m256 cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
  b = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
  c = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
  d = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
}

// The halves (x0, x1) and (y0, y1) become (x0, y0) and (x1, y1).
inline void swap_halves(__m256& x, __m256& y) {
  const __m256 low = _mm256_permute2f128_ps(x, y, 0x20);
  y = _mm256_permute2f128_ps(x, y, 0x31);
  x = low;
}

inline void transpose_8x8(__m256 (&r)[8]) {
  transpose_4x4(r[0], r[1], r[2], r[3]);
  transpose_4x4(r[4], r[5], r[6], r[7]);
  for (int k = 0; k < 4; ++k) swap_halves(r[k], r[k + 4]);
}

// Four columns: eight rows are four registers of two rows each.
template <int L>
inline void load_four(float* __restrict tile, const float* __restrict rows) {
  for (int i = 0; i < L; i += 8) {
    __m256 r[4];  // rows 0 1, 2 3, 4 5, 6 7; then 0 4, 1 5, 2 6, 3 7
    for (int k = 0; k < 4; ++k) r[k] = _mm256_loadu_ps(rows + i * 4 + k * 8);
    swap_halves(r[0], r[2]);
    swap_halves(r[1], r[3]);
    transpose_4x4(r[0], r[2], r[1], r[3]);
    _mm256_store_ps(tile + i, r[0]);
    _mm256_store_ps(tile + L + i, r[2]);
    _mm256_store_ps(tile + 2 * L + i, r[1]);
    _mm256_store_ps(tile + 3 * L + i, r[3]);
  }
}

template <int L>
inline void store_four(float* __restrict rows, const float* __restrict tile) {
  for (int i = 0; i < L; i += 8) {
    __m256 r[4];
    for (int k = 0; k < 4; ++k) r[k] = _mm256_load_ps(tile + k * L + i);
    transpose_4x4(r[0], r[1], r[2], r[3]);  // rows 0 4, 1 5, 2 6, 3 7
    swap_halves(r[0], r[1]);
    swap_halves(r[2], r[3]);
    _mm256_storeu_ps(rows + i * 4, r[0]);
    _mm256_storeu_ps(rows + i * 4 + 8, r[2]);
    _mm256_storeu_ps(rows + i * 4 + 16, r[1]);
    _mm256_storeu_ps(rows + i * 4 + 24, r[3]);
  }
}

inline __m256i first_columns(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Any other width: blocks of eight rows by eight columns. The first column of the one that begins at j: the last block
// overlaps the one before.
inline int64_t block_column(int64_t j, int64_t width) { return width >= 8 && j + 8 > width ? width - 8 : j; }

template <int L>
inline void load_blocks(float* __restrict tile, const float* __restrict rows, int64_t width) {
  const int columns = width < 8 ? int(width) : 8;
  const __m256i mask = first_columns(columns);
  for (int i = 0; i < L; i += 8) {
    // Eight floats from a narrow row on reach into the rows after it; of the tile's last rows, beyond its end.
    const bool masked = width < 8 && i + 8 == L;
    for (int64_t next = 0; next < width; next += 8) {
      const int64_t j = block_column(next, width);
      const float* __restrict from = rows + i * width + j;
      __m256 block[8];
      if (masked)
        for (int k = 0; k < 8; ++k) block[k] = _mm256_maskload_ps(from + k * width, mask);
      else
        for (int k = 0; k < 8; ++k) block[k] = _mm256_loadu_ps(from + k * width);
      transpose_8x8(block);
      for (int k = 0; k < columns; ++k) _mm256_store_ps(tile + (j + k) * L + i, block[k]);
    }
  }
}

template <int L>
inline void store_blocks(float* __restrict rows, const float* __restrict tile, int64_t width) {
  const int columns = width < 8 ? int(width) : 8;
  const __m256i mask = first_columns(columns);
  for (int i = 0; i < L; i += 8)
    for (int64_t next = 0; next < width; next += 8) {
      const int64_t j = block_column(next, width);
      __m256 block[8];
      for (int k = 0; k < 8; ++k) block[k] = k < columns ? _mm256_load_ps(tile + (j + k) * L + i) : _mm256_setzero_ps();
      transpose_8x8(block);
      // A narrow row's eight floats spill into the rows after it, which are written later; those of the tile's last
      // rows (two, since no row has fewer than three) would spill beyond its end.
      const int whole = width < 8 && i + 8 == L ? 6 : 8;
      for (int k = 0; k < whole; ++k) _mm256_storeu_ps(rows + (i + k) * width + j, block[k]);
      for (int k = whole; k < 8; ++k) _mm256_maskstore_ps(rows + (i + k) * width + j, mask, block[k]);
    }
}
#else
template <int L>
inline void load_four(float* __restrict tile, const float* __restrict rows) {
  transpose_in<L, 4>(tile, rows);
}

template <int L>
inline void store_four(float* __restrict rows, const float* __restrict tile) {
  transpose_out<L, 4>(rows, tile);
}

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
    if (n == L) return width == 4 ? load_four<L>(tile, rows) : load_blocks<L>(tile, rows, width);
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
    if (n == L) return width == 4 ? store_four<L>(rows, tile) : store_blocks<L>(rows, tile, width);
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
  rows.all_live = rows.count == L;
  PYPPO_LANES(i) rows.live[i] = 1;
  for (int i = rows.count; i < L; ++i) rows.live[i] = 0;
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

// Whole vectors of actions, one a sample.
template <int L, class Integer>
inline void load_one_action(int32_t* __restrict lanes, const Integer* __restrict actions) {
  PYPPO_LANES(i) lanes[i] = actions[i] == Integer(int32_t(actions[i])) ? int32_t(actions[i]) : -1;
}

#if defined(__AVX2__)
template <int L>
inline void load_one_action(int32_t* __restrict lanes, const int64_t* __restrict actions) {
  for (int i = 0; i < L; i += 8) {
    const __m256 a = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(actions + i)));
    const __m256 b = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(actions + i + 4)));
    const __m256i low = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    const __m256i high = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
    const __m256i fits = _mm256_cmpeq_epi32(high, _mm256_srai_epi32(low, 31));
    const __m256i action = _mm256_or_si256(low, _mm256_cmpeq_epi32(fits, _mm256_setzero_si256()));
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + i), _mm256_permute4x64_epi64(action, 0xd8));
  }
}
#endif

// Integer actions [count, width] as int32 [width][L]; one that does not fit becomes -1, which no action is. Dead lanes
// become 0.
template <int L, class Integer>
inline void load_integers(int32_t* __restrict tile, const Integer* __restrict actions, const TileRows<L>& rows,
                          int64_t width) {
  if (rows.count == L && width == 1) {
    load_one_action<L>(tile, actions);
  } else {
    for (int i = 0; i < L; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const Integer action = i < rows.count ? actions[i * width + j] : Integer(0);
        tile[j * L + i] = action == Integer(int32_t(action)) ? int32_t(action) : -1;
      }
  }
  if (rows.all_live) return;
  for (int64_t j = 0; j < width; ++j) PYPPO_LANES(i) tile[j * L + i] = rows.live[i] ? tile[j * L + i] : 0;
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
