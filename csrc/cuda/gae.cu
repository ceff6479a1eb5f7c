// Generalized advantage estimation on a GPU: parallel over columns (environments) and over time.
//
// A block owns a strip of columns and walks backward through tiles of rows. Each thread holds a few rows of one column
// in registers, so memory is read once: it first runs its rows from an empty carry, which gives what they do to any
// carry (a CarryMap); a scan over the tile's threads tells it the carry that really arrives; then it runs its rows
// again. Few columns and many rows: the tiles are divided into spans, and a first kernel finds each span's map. Moments
// are summed up beside that; where there are several blocks, the last to finish merges what all have.
#include "../math/gae_step.h"
#include "../math/moments.h"
#include "reduce.cuh"

namespace pyppo::cuda {
namespace {

constexpr int max_threads = 512;
constexpr int max_columns = 32;  // of a strip

template <class T>
constexpr int rows_per_thread = sizeof(T) == 4 ? 8 : 4;

enum Link { passes, linked, cut };  // no valid row; the carry reaches the first row; an episode ends on the way

// What a stretch of rows does to the carry: next_value becomes that of its first valid row, and
// trace becomes offset + multiplier * (gamma * next_value + gamma * lambda * trace), or offset alone after a cut.
template <class T>
struct CarryMap {
  T first_value, offset, multiplier;
  int link;
};

template <class T>
__device__ CarryMap<T> pass_on() {
  return {T(0), T(0), T(0), passes};
}

// Of a block's advantages and returns at valid rows.
struct BlockMoments {
  double count, mean[2], squares[2];
};

template <class T>
struct GaeKernelArgs {
  const T *rewards, *values, *final_values;
  const uint8_t *terminated, *truncated, *valid;
  T *advantages, *returns;
  CarryMap<T>* maps;            // [spans, num_envs]; that of span 0 is not needed
  double* moments;              // [2, num_gae_moments], nullable
  BlockMoments* block_moments;  // [blocks], null where there is one block
  unsigned* arrivals;           // for the last of several blocks
  int64_t num_steps, num_envs;
  T gamma, gamma_lambda;
  int column_bits;  // log2 of the strip's columns
  int64_t strips, tiles, tiles_per_span, spans;
};

template <class T>
__device__ math::GaeCarry<T> apply(const GaeKernelArgs<T>& a, const CarryMap<T>& map, const math::GaeCarry<T>& carry) {
  const T arriving = a.gamma * carry.next_value + a.gamma_lambda * carry.trace;
  const T trace = map.link == cut ? map.offset : map.offset + map.multiplier * arriving;
  return {map.link == passes ? carry.next_value : map.first_value, map.link == passes ? carry.trace : trace};
}

// The map of two adjoining stretches; what `later` does comes first.
template <class T>
__device__ CarryMap<T> compose(const GaeKernelArgs<T>& a, const CarryMap<T>& earlier, const CarryMap<T>& later) {
  if (earlier.link == passes) return later;
  if (earlier.link == cut || later.link == passes) return earlier;
  const T arriving = a.gamma * later.first_value + a.gamma_lambda * later.offset;
  return {earlier.first_value, earlier.offset + earlier.multiplier * arriving,
          earlier.multiplier * a.gamma_lambda * later.multiplier, later.link};
}

// The rows of one thread in one tile. A row past the end of the rollout is a row that is not valid.
template <class T, bool has_final>
struct ThreadRows {
  static constexpr int count = rows_per_thread<T>;
  int64_t at;   // the element of the first row
  int present;  // how many rows exist
  T reward[count], value[count + 1], final_value[has_final ? count : 1];
  unsigned ends;  // a bit a row: terminated from bit 0, truncated from bit 16
  unsigned valid_bits;

  __device__ void load(const GaeKernelArgs<T>& a, int64_t row, int64_t column) {
    at = row * a.num_envs + column;
    const int64_t left = column < a.num_envs ? a.num_steps - row : 0;
    present = left < 0 ? 0 : (left < count ? int(left) : count);
    ends = valid_bits = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i >= present) continue;
      const int64_t element = at + i * a.num_envs;
      reward[i] = a.rewards[element];
      value[i] = a.values[element];
      if constexpr (has_final) final_value[i] = a.final_values[element];
      ends |= unsigned(a.terminated[element] != 0) << i;
      ends |= unsigned(a.truncated[element] != 0) << (16 + i);
      valid_bits |= (a.valid == nullptr ? 1u : unsigned(a.valid[element] != 0)) << i;
    }
#pragma unroll
    for (int i = 1; i <= count; ++i)  // the row after the last one that exists: an episode may end there
      if (i == present) value[i] = a.values[at + i * a.num_envs];
  }

  // The value of the final observation, read where row i is truncated.
  __device__ T truncated_value(int i) const {
    if constexpr (has_final)
      return final_value[i];
    else
      return value[i + 1];
  }

  __device__ bool terminated(int i) const { return (ends >> i & 1u) != 0; }
  __device__ bool truncated(int i) const { return (ends >> (16 + i) & 1u) != 0; }
  __device__ bool valid(int i) const { return (valid_bits >> i & 1u) != 0; }

  __device__ T step(const GaeKernelArgs<T>& a, math::GaeCarry<T>& carry, int i) const {
    return math::gae_step(carry, reward[i], value[i], truncated_value(i), terminated(i), truncated(i), valid(i),
                          a.gamma, a.gamma_lambda);
  }

  __device__ CarryMap<T> map(const GaeKernelArgs<T>& a) const {
    math::GaeCarry<T> carry{T(0), T(0)};
    T multiplier = T(1);
    bool seen = false;
#pragma unroll
    for (int i = count - 1; i >= 0; --i) {
      if (i >= present) continue;
      step(a, carry, i);
      multiplier = seen && valid(i) ? multiplier * a.gamma_lambda : multiplier;
      seen = seen || valid(i);
    }
    const bool is_cut = ((ends | ends >> 16) & valid_bits) != 0;
    return {carry.next_value, carry.trace, multiplier, !seen ? passes : (is_cut ? cut : linked)};
  }

  // Runs the rows from the carry that arrives and writes their outputs, which stay: advantages in reward[i],
  // returns in value[i + 1]. Returns the carry that leaves.
  __device__ math::GaeCarry<T> run(const GaeKernelArgs<T>& a, math::GaeCarry<T> carry) {
#pragma unroll
    for (int i = count - 1; i >= 0; --i) {
      if (i >= present) continue;
      const T advantage = step(a, carry, i);
      const int64_t element = at + i * a.num_envs;
      a.advantages[element] = reward[i] = advantage;
      a.returns[element] = value[i + 1] = valid(i) ? advantage + value[i] : T(0);
    }
    return carry;
  }

  // Of advantages or returns, after `run`.
  __device__ math::Moments moments(const T* x) const {
    math::Moments m{0.0, 0.0, 0.0};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (!valid(i)) continue;
      m.count += 1;
      m.mean += double(x[i]);
    }
    if (m.count == 0) return m;
    m.mean /= m.count;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (valid(i)) m.squares += (double(x[i]) - m.mean) * (double(x[i]) - m.mean);
    return m;
  }
};

// What several of a block's threads, or several blocks, have: x[0] and x[1] of each. Every thread must call it and gets
// the whole.
template <int max_threads>
__device__ BlockMoments merge_all(const math::Moments (&x)[2], int threads) {
  double sums[3] = {x[0].count, x[0].count * x[0].mean, x[1].count * x[1].mean};
  block_sum<max_threads>(sums, threads);
  BlockMoments all{sums[0], {0.0, 0.0}, {0.0, 0.0}};
  if (all.count == 0) return all;
  double squares[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    all.mean[k] = sums[1 + k] / all.count;
    squares[k] = x[k].count == 0 ? 0.0 : math::squares_about(x[k], all.mean[k]);
  }
  block_sum<max_threads>(squares, threads);
#pragma unroll
  for (int k = 0; k < 2; ++k) all.squares[k] = squares[k];
  return all;
}

// Of all blocks, in a fixed order.
__device__ BlockMoments merge_blocks(const BlockMoments* from, int64_t blocks) {
  math::Moments moments[2] = {};
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    const double count = other_blocks(&from[i].count);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const math::Moments m{count, other_blocks(&from[i].mean[k]), other_blocks(&from[i].squares[k])};
      moments[k] = math::merge(moments[k], m);
    }
  }
  return merge_all<max_threads>(moments, blockDim.x);
}

__device__ void store_moments(double* to, const BlockMoments& m) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    to[k * num_gae_moments + moment_count] = m.count;
    to[k * num_gae_moments + moment_mean] = m.mean[k];
    to[k * num_gae_moments + moment_squared_deviations] = m.squares[k];
  }
}

// A block's maps, one of two copies at a time: a step of the scan writes one while slower threads read the other.
template <class T>
struct MapBoard {
  T first_value[2][max_threads], offset[2][max_threads], multiplier[2][max_threads];
  int link[2][max_threads];

  __device__ void put(int copy, int i, const CarryMap<T>& map) {
    first_value[copy][i] = map.first_value;
    offset[copy][i] = map.offset;
    multiplier[copy][i] = map.multiplier;
    link[copy][i] = map.link;
  }
  __device__ CarryMap<T> get(int copy, int i) const {
    return {first_value[copy][i], offset[copy][i], multiplier[copy][i], link[copy][i]};
  }
};

// From each thread's map to that of its rows and all later ones of the tile (`map`), and of the later ones alone (the
// result). Threads of one column lie `columns` apart.
template <class T>
__device__ CarryMap<T> scan(const GaeKernelArgs<T>& a, MapBoard<T>& board, int& copy, CarryMap<T>& map) {
  const int thread = threadIdx.x, threads = blockDim.x, columns = 1 << a.column_bits;
  for (int distance = columns; distance < threads; distance *= 2) {
    board.put(copy, thread, map);
    __syncthreads();
    if (thread + distance < threads) map = compose(a, map, board.get(copy, thread + distance));
    copy ^= 1;
  }
  board.put(copy, thread, map);
  __syncthreads();
  const CarryMap<T> later = thread + columns < threads ? board.get(copy, thread + columns) : pass_on<T>();
  copy ^= 1;
  return later;
}

// The carry that arrives at the end of a span: the bootstrap value, taken through all later spans.
template <class T>
__device__ math::GaeCarry<T> span_carry(const GaeKernelArgs<T>& a, int64_t span, int64_t column) {
  math::GaeCarry<T> carry{T(0), T(0)};
  if (column >= a.num_envs) return carry;
  carry.next_value = a.values[a.num_steps * a.num_envs + column];
#pragma unroll 4
  for (int64_t later = a.spans - 1; later > span; --later) carry = apply(a, a.maps[later * a.num_envs + column], carry);
  return carry;
}

// `summarize`: writes the maps of spans 1, 2, …; otherwise advantages and returns.
template <class T, bool has_final, bool summarize, bool has_moments>
__global__ __launch_bounds__(max_threads, has_final || has_moments
                                              ? 1
                                              : 2) void gae_kernel(const __grid_constant__ GaeKernelArgs<T> a) {
  __shared__ MapBoard<T> board;
  __shared__ T carried_value[2][max_columns], carried_trace[2][max_columns];  // copies alternate, as on the board
  const int strip_column = threadIdx.x & ((1 << a.column_bits) - 1), chunk = threadIdx.x >> a.column_bits;
  const int64_t tile_rows = int64_t(blockDim.x >> a.column_bits) * rows_per_thread<T>;
  const int64_t span = blockIdx.x / a.strips + (summarize ? 1 : 0);
  const int64_t column = ((blockIdx.x % a.strips) << a.column_bits) + strip_column;
  const int64_t first_tile = span * a.tiles_per_span, end_tile = smaller(first_tile + a.tiles_per_span, a.tiles);

  CarryMap<T> whole = pass_on<T>();
  math::Moments moments[2] = {};
  int copy = 0, carry_copy = 0;
  if (!summarize && chunk == 0) {
    const math::GaeCarry<T> carry = span_carry(a, span, column);
    carried_value[0][strip_column] = carry.next_value;
    carried_trace[0][strip_column] = carry.trace;
  }
  for (int64_t tile = end_tile - 1; tile >= first_tile; --tile) {
    ThreadRows<T, has_final> rows;
    rows.load(a, tile * tile_rows + chunk * rows_per_thread<T>, column);
    CarryMap<T> map = rows.map(a);
    const CarryMap<T> later = scan(a, board, copy, map);
    if (summarize) {
      whole = compose(a, map, whole);
      continue;
    }
    const math::GaeCarry<T> arriving{carried_value[carry_copy][strip_column], carried_trace[carry_copy][strip_column]};
    const math::GaeCarry<T> leaving = rows.run(a, apply(a, later, arriving));
    carry_copy ^= 1;
    if (chunk == 0) {
      carried_value[carry_copy][strip_column] = leaving.next_value;
      carried_trace[carry_copy][strip_column] = leaving.trace;
    }
    if (has_moments) {
      moments[0] = math::merge(moments[0], rows.moments(rows.reward));
      moments[1] = math::merge(moments[1], rows.moments(rows.value + 1));
    }
  }
  if (has_moments) {
    BlockMoments all = merge_all<max_threads>(moments, blockDim.x);
    if (a.block_moments != nullptr) {
      if (threadIdx.x == 0) a.block_moments[blockIdx.x] = all;
      if (!last_block(a.arrivals)) return;
      all = merge_blocks(a.block_moments, gridDim.x);
    }
    if (threadIdx.x == 0) store_moments(a.moments, all);
  }
  if (summarize && chunk == 0 && column < a.num_envs) a.maps[span * a.num_envs + column] = whole;
}

// How a rollout's shape is divided; of the shape alone, so that the same input gives the same bits on any device.
struct GaePlan {
  int column_bits, threads;
  int64_t strips, tiles, tiles_per_span, spans;

  int64_t blocks() const { return strips * spans; }
  size_t map_bytes(const GaeArgs& args) const {
    const size_t one = args.dtype == DType::f64 ? sizeof(CarryMap<double>) : sizeof(CarryMap<float>);
    return spans > 1 ? size_t(spans * args.num_envs) * one : 0;
  }
  size_t moment_bytes(const GaeArgs& args) const {
    return args.moments != nullptr && blocks() > 1 ? size_t(blocks()) * sizeof(BlockMoments) : 0;
  }
};

GaePlan plan(const GaeArgs& args) {
  constexpr int64_t enough_blocks = 128;  // about one for each multiprocessor
  const bool wide_type = args.dtype == DType::f64;
  const int rows = wide_type ? rows_per_thread<double> : rows_per_thread<float>;
  const int64_t chunks = ceil_div(args.num_steps, rows);
  GaePlan p;
  p.column_bits = 5;
  while (p.column_bits > 0 && int64_t(1) << (p.column_bits - 1) >= args.num_envs) --p.column_bits;
  // A narrower strip gives more blocks and a longer tile, down to the 32 bytes that memory moves at once.
  const int least_bits = wide_type ? 2 : 3;
  while (p.column_bits > least_bits && ceil_div(args.num_envs, int64_t(1) << p.column_bits) < enough_blocks &&
         chunks > max_threads >> p.column_bits)
    --p.column_bits;
  const int64_t columns = int64_t(1) << p.column_bits;
  p.threads = int(smaller<int64_t>(max_threads, ceil_div(chunks * columns, 32) * 32));
  p.strips = ceil_div(args.num_envs, columns);
  if (args.moments != nullptr) {  // the block that merges all blocks' should have threads for them
    const int64_t merging = smaller<int64_t>(max_threads / 2, ceil_div(p.strips, 32) * 32);
    if (p.threads < merging) p.threads = int(merging);
  }
  p.tiles = ceil_div(args.num_steps, p.threads / columns * rows);
  const int64_t spans = p.strips < enough_blocks / 2 ? smaller(p.tiles, enough_blocks / p.strips) : 1;
  p.tiles_per_span = ceil_div(p.tiles, spans);
  p.spans = ceil_div(p.tiles, p.tiles_per_span);
  return p;
}

bool is_empty(const GaeArgs& args) { return args.num_steps <= 0 || args.num_envs <= 0; }

template <class T>
void launch_gae(const GaeArgs& args, void* workspace, Stream stream) {
  const GaePlan p = plan(args);
  GaeKernelArgs<T> a;
  a.rewards = static_cast<const T*>(args.rewards);
  a.values = static_cast<const T*>(args.values);
  a.final_values = static_cast<const T*>(args.final_values);
  a.terminated = args.terminated;
  a.truncated = args.truncated;
  a.valid = args.valid;
  a.advantages = static_cast<T*>(args.advantages);
  a.returns = static_cast<T*>(args.returns);
  a.maps = static_cast<CarryMap<T>*>(workspace);
  a.num_steps = args.num_steps;
  a.num_envs = args.num_envs;
  a.gamma = T(args.gamma);
  a.gamma_lambda = T(args.gamma * args.gae_lambda);
  a.column_bits = p.column_bits;
  a.strips = p.strips;
  a.tiles = p.tiles;
  a.tiles_per_span = p.tiles_per_span;
  a.spans = p.spans;
  a.moments = args.moments;
  const bool merges = p.moment_bytes(args) > 0;
  a.block_moments =
      merges ? reinterpret_cast<BlockMoments*>(static_cast<char*>(workspace) + p.map_bytes(args)) : nullptr;
  a.arrivals = merges ? arrivals(stream) : nullptr;
  const auto launch_with = [&](auto final_type, auto moments_type) {
    constexpr bool has_final = decltype(final_type)::value, has_moments = decltype(moments_type)::value;
    if (p.spans > 1)
      launch("gae (spans)", gae_kernel<T, has_final, true, false>, p.blocks() - p.strips, p.threads, 0, stream, a);
    launch("gae", gae_kernel<T, has_final, false, has_moments>, p.blocks(), p.threads, 0, stream, a);
  };
  const auto launch_final = [&](auto final_type) {
    if (args.moments != nullptr)
      launch_with(final_type, std::true_type{});
    else
      launch_with(final_type, std::false_type{});
  };
  if (args.final_values != nullptr)
    launch_final(std::true_type{});
  else
    launch_final(std::false_type{});
}

}  // namespace

size_t gae_workspace(const GaeArgs& args) {
  if (is_empty(args)) return 0;
  const GaePlan p = plan(args);
  return p.map_bytes(args) + p.moment_bytes(args);
}

void gae(const GaeArgs& args, void* workspace, Stream stream) {
  if (is_empty(args)) {
    if (args.moments != nullptr) launch_zero(args.moments, 2 * num_gae_moments * sizeof(double), stream);
    return;
  }
  dispatch(args.dtype, [&](auto type) { launch_gae<typename decltype(type)::type>(args, workspace, stream); });
}

}  // namespace pyppo::cuda
