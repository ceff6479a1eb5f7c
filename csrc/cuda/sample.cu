// Draws actions on a GPU, with their log-probs and the distributions' entropies.
//
// Sums over a row run in ascending order, one number at a time, also where a warp shares the row: the CPU adds in that
// order, so both find the same action.
#include "distributions.cuh"

namespace pyppo::cuda {
namespace {

constexpr int threads = 128;
constexpr int warps = threads / warp_size;
constexpr int64_t max_blocks = 4096;
constexpr int64_t thread_width = 32;         // wider rows are a warp's
constexpr int64_t thread_parts_width = 256;  // unless they have many small parts

struct Noise {
  uint64_t seed;
  int64_t row_offset;
  const int64_t* steps;  // nullable
  int64_t step;
  bool deterministic;

  // The block that holds the i-th uniform of a row.
  template <class T>
  __device__ math::PhiloxBlock block(int64_t row, int i) const {
    const uint64_t row_step = uint64_t(steps != nullptr ? steps[row] : step);
    return math::action_noise(seed, uint64_t(row_offset + row), row_step, uint32_t(i / math::Uniforms<T>::per_block));
  }

  // The i-th uniform of a row, in [0, 1).
  template <class T>
  __device__ T uniform(int64_t row, int i) const {
    return uniform_in<T>(block<T>(row, i), i);
  }

  // Selects, since an index known only at run time would put the block into local memory.
  template <class T>
  __device__ static T uniform_in(const math::PhiloxBlock& block, int i) {
    constexpr int per_block = math::Uniforms<T>::per_block;
    T uniform = math::uniform_at(block, 0, T(0));
#pragma unroll
    for (int k = 1; k < per_block; ++k) uniform = i % per_block == k ? math::uniform_at(block, k, T(0)) : uniform;
    return uniform;
  }
};

// Calls f(i, x) in ascending order for the numbers x that f's team holds, one a lane, `count` of them.
template <class Team, class T, class F>
__device__ void in_order(T x, int count, F&& f) {
#pragma unroll 8
  for (int i = 0; i < count; ++i) f(i, Team::from(x, i));
}

// The sums of a row's terms, added in ascending order.
template <class Team, class T>
__device__ void add_in_order(T& sum, T x, int count) {
  in_order<Team>(x, count, [&](int, T y) { sum += y; });
}

template <class Team>
__device__ int lanes_from(int first, int end) {
  return smaller(Team::size, end - first);
}

template <class Team, class T, class Row>
__device__ Softmax<T> ordered_softmax(const Row& logit, int begin, int end) {
  const T largest = max_logit<Team, T>(logit, begin, end);
  T sum = T(0), weighted = T(0);
  for (int first = begin; first < end; first += Team::size) {
    const int j = first + Team::lane(), count = lanes_from<Team>(first, end);
    const T shifted = (j < end ? logit(j) : largest) - largest;
    const T e = math::exp(shifted);
    add_in_order<Team>(sum, e, count);
    add_in_order<Team>(weighted, math::categorical_weighted(e, shifted), count);
  }
  const T log_sum = math::log(sum);
  return {largest, sum, log_sum, math::categorical_entropy(log_sum, weighted / sum)};
}

// The first action whose logit is the largest.
template <class Team, class T, class Row>
__device__ int mode(const Row& logit, T largest, int begin, int end) {
  for (int first = begin; first < end; first += Team::size) {
    const int j = first + Team::lane(), count = lanes_from<Team>(first, end);
    const int is_largest = j < end && logit(j) == largest ? 1 : 0;
    for (int i = 0; i < count; ++i)
      if (Team::from(is_largest, i) != 0) return first + i;
  }
  return begin;
}

// Inverse of the cumulative distribution: the first action whose cumulative sum passes u S. Should u S round up to S,
// the last possible action stands in.
template <class Team, class T, class Row>
__device__ int draw(const Row& logit, const Softmax<T>& s, T uniform, int begin, int end) {
  const T threshold = uniform * s.sum;
  T cumulative = T(0);
  int action = -1, last = begin;
  for (int first = begin; first < end && action < 0; first += Team::size) {
    const int j = first + Team::lane();
    const T e = j < end ? math::exp(logit(j) - s.max) : T(0);
    in_order<Team>(e, lanes_from<Team>(first, end), [&](int i, T x) {
      cumulative += x;
      action = action < 0 && cumulative > threshold ? first + i : action;
      last = x > T(0) ? first + i : last;
    });
  }
  return action < 0 ? last : action;
}

template <class T>
struct Drawn {
  T logp, entropy;
};

template <class Team, class T, class Row>
__device__ Drawn<T> sample_categorical(const Parts& parts, const Row& logit, const Noise& noise, int64_t row,
                                       const ErrorFlags& errors, int64_t* actions) {
  Drawn<T> out{T(0), T(0)};
  for (int k = 0; k < parts.count; ++k) {
    const int begin = parts.offset[k], end = parts.offset[k + 1];
    const Softmax<T> s = ordered_softmax<Team, T>(logit, begin, end);
    if (!(s.sum > T(0))) errors.distribution(row);
    const int j = noise.deterministic ? mode<Team, T>(logit, s.max, begin, end)
                                      : draw<Team, T>(logit, s, noise.uniform<T>(row, k), begin, end);
    if (Team::lane() == 0) actions[k] = j - begin;
    out.logp += s.logp(logit(j));
    out.entropy += s.entropy;
  }
  return out;
}

// store(j, bit) takes the bits.
template <class Team, class T, class Row, class Store>
__device__ Drawn<T> sample_bernoulli(int width, const Row& logit, const Noise& noise, int64_t row,
                                     const ErrorFlags& errors, Store&& store) {
  Drawn<T> out{T(0), T(0)};
  for (int first = 0; first < width; first += Team::size) {
    const int j = first + Team::lane(), count = lanes_from<Team>(first, width);
    T logp = T(0), entropy = T(0);
    if (j < width) {
      const T l = logit(j);
      if (l != l) errors.distribution(row);
      const bool bit = noise.deterministic ? l > T(0) : noise.uniform<T>(row, j) < math::sigmoid(l);
      store(j, bit);
      logp = math::bernoulli_logp(l, bit);
      entropy = math::bernoulli_entropy(l);
    }
    add_in_order<Team>(out.logp, logp, count);
    add_in_order<Team>(out.entropy, entropy, count);
  }
  return out;
}

// Dimensions 2p and 2p + 1 share one pair of uniforms.
template <class T>
__device__ T normal_noise(const Noise& noise, int64_t row, int j) {
  const int even = j & ~1;  // both are in one block
  const math::PhiloxBlock block = noise.block<T>(row, even);
  T first, second;
  math::normal_pair(noise.uniform_in<T>(block, even), noise.uniform_in<T>(block, even + 1), first, second);
  return j == even ? first : second;
}

template <class Team, class T, class S, class To>
__device__ Drawn<T> sample_normal(int width, const S* mean, const S* log_std, const Noise& noise, int64_t row,
                                  const ErrorFlags& errors, To* actions) {
  Drawn<T> out{T(0), T(0)};
  for (int first = 0; first < width; first += Team::size) {
    const int j = first + Team::lane(), count = lanes_from<Team>(first, width);
    T logp = T(0), entropy = T(0);
    if (j < width) {
      const T m = T(mean[j]), s = T(log_std[j]);
      if (!math::normal_is_finite(m, s)) errors.distribution(row);
      const T action = noise.deterministic ? m : m + math::exp(s) * normal_noise<T>(noise, row, j);
      actions[j] = action;
      // As the loss will compute it from the stored action.
      logp = math::normal_logp((action - m) * math::exp(-s), s);
      entropy = math::normal_entropy(s);
    }
    add_in_order<Team>(out.logp, logp, count);
    add_in_order<Team>(out.entropy, entropy, count);
  }
  return out;
}

// How each kind of distribution lies in the caller's tensors: a tile of its inputs, in which the actions take their
// place where they are as many; and a row, drawn by a thread from a tile or by a warp from the tensors themselves.
template <class T, class N>
struct Categorical {
  const N* logits;
  const uint8_t* mask;
  int64_t* actions;
  int width;
  Parts parts;

  static constexpr int slots = 1;

  __device__ LogitRow<T, N> logits_at(int64_t at) const { return {logits + at, mask != nullptr ? mask + at : nullptr}; }
  __device__ void load(const Tile<T>& tile, int64_t first, int count) const {
    const LogitRow<T, N> from = logits_at(first * width);
    tile.fill(0, count, [&](int element) { return from(element); });
  }
  __device__ Drawn<T> staged(const Tile<T>& tile, int r, int64_t row, const Noise& noise,
                             const ErrorFlags& errors) const {
    const LogitRow<T, T> from{tile.row(0, r), nullptr};
    return sample_categorical<OneThread, T>(parts, from, noise, row, errors, actions + row * parts.count);
  }
  __device__ Drawn<T> direct(int64_t row, const Noise& noise, const ErrorFlags& errors) const {
    return sample_categorical<Warp, T>(parts, logits_at(row * width), noise, row, errors, actions + row * parts.count);
  }
  __device__ void store(const Tile<T>&, int64_t, int) const {}
};

template <class T, class N>
struct Bernoulli {
  const N* logits;
  const uint8_t* mask;
  int64_t* actions;
  int width;

  static constexpr int slots = 1;

  __device__ LogitRow<T, N> logits_at(int64_t at) const { return {logits + at, mask != nullptr ? mask + at : nullptr}; }
  __device__ void load(const Tile<T>& tile, int64_t first, int count) const {
    const LogitRow<T, N> from = logits_at(first * width);
    tile.fill(0, count, [&](int element) { return from(element); });
  }
  __device__ Drawn<T> staged(const Tile<T>& tile, int r, int64_t row, const Noise& noise,
                             const ErrorFlags& errors) const {
    T* logit = tile.row(0, r);
    return sample_bernoulli<OneThread, T>(width, LogitRow<T, T>{logit, nullptr}, noise, row, errors,
                                          [&](int j, bool bit) { logit[j] = T(bit ? 1 : 0); });
  }
  __device__ Drawn<T> direct(int64_t row, const Noise& noise, const ErrorFlags& errors) const {
    int64_t* bits = actions + row * width;
    return sample_bernoulli<Warp, T>(width, logits_at(row * width), noise, row, errors,
                                     [&](int j, bool bit) { bits[j] = bit ? 1 : 0; });
  }
  __device__ void store(const Tile<T>& tile, int64_t first, int count) const {
    tile.store(0, count, actions + first * width);
  }
};

template <class T, class N>
struct Normal {
  const N *mean, *log_std;
  T* actions;
  int width;
  bool per_sample;  // log_std

  static constexpr int slots = 2;

  __device__ void load(const Tile<T>& tile, int64_t first, int count) const {
    const int64_t at = first * width, log_std_at = per_sample ? at : 0;
    tile.fill(0, count, [&](int element) { return T(mean[at + element]); });
    tile.fill(1, per_sample ? count : 1, [&](int element) { return T(log_std[log_std_at + element]); });
  }
  __device__ Drawn<T> staged(const Tile<T>& tile, int r, int64_t row, const Noise& noise,
                             const ErrorFlags& errors) const {
    return sample_normal<OneThread, T>(width, tile.row(0, r), tile.row(1, per_sample ? r : 0), noise, row, errors,
                                       tile.row(0, r));
  }
  __device__ Drawn<T> direct(int64_t row, const Noise& noise, const ErrorFlags& errors) const {
    const int64_t at = row * width;
    return sample_normal<Warp, T>(width, mean + at, log_std + (per_sample ? at : 0), noise, row, errors, actions + at);
  }
  __device__ void store(const Tile<T>& tile, int64_t first, int count) const {
    tile.store(0, count, actions + first * width);
  }
};

template <class Dist, class T>
struct SampleKernelArgs {
  int64_t batch;
  Dist dist;
  Noise noise;
  ErrorFlags errors;
  T *logp, *entropy;
  int tile_rows;

  __device__ void write(int64_t row, const Drawn<T>& drawn) const {
    logp[row] = drawn.logp;
    entropy[row] = drawn.entropy;
  }
};

template <class Dist, class T>
__global__ __launch_bounds__(threads, 8) void tile_kernel(const __grid_constant__ SampleKernelArgs<Dist, T> a) {
  const Tile<T> tile{dynamic_shared<T>(), a.tile_rows, a.dist.width};
  const int64_t step = int64_t(gridDim.x) * tile.rows;
  for (int64_t first = int64_t(blockIdx.x) * tile.rows; first < a.batch; first += step) {
    const int count = int(smaller<int64_t>(tile.rows, a.batch - first)), r = threadIdx.x;
    a.dist.load(tile, first, count);
    __syncthreads();
    if (r < count) a.write(first + r, a.dist.staged(tile, r, first + r, a.noise, a.errors));
    __syncthreads();
    a.dist.store(tile, first, count);
    __syncthreads();
  }
}

template <class Dist, class T>
__global__ __launch_bounds__(threads, 8) void warp_kernel(const __grid_constant__ SampleKernelArgs<Dist, T> a) {
  const int64_t first = int64_t(blockIdx.x) * warps + threadIdx.x / warp_size, step = int64_t(gridDim.x) * warps;
  for (int64_t row = first; row < a.batch; row += step) {
    const Drawn<T> drawn = a.dist.direct(row, a.noise, a.errors);
    if (Warp::lane() == 0) a.write(row, drawn);
  }
}

template <class T, class Dist>
void launch_sample(const SampleArgs& args, const Dist& dist, int64_t* errors, Stream stream) {
  const bool many_parts = args.dist.kind == Distribution::categorical && args.dist.num_parts > 1;
  SampleKernelArgs<Dist, T> a;
  a.batch = args.batch;
  a.dist = dist;
  a.noise = {args.seed, args.row_offset, args.steps, args.step, args.deterministic};
  a.errors = {errors};
  a.logp = static_cast<T*>(args.logp);
  a.entropy = static_cast<T*>(args.entropy);
  a.tile_rows = tile_rows<T>(threads, Dist::slots, dist.width, many_parts ? thread_parts_width : thread_width);
  if (a.tile_rows > 0)
    launch("sample", tile_kernel<Dist, T>, smaller(max_blocks, ceil_div(args.batch, a.tile_rows)), threads,
           Tile<T>::bytes(Dist::slots, a.tile_rows, dist.width), stream, a);
  else
    launch("sample (wide)", warp_kernel<Dist, T>, smaller(max_blocks, ceil_div(args.batch, warps)), threads, 0, stream,
           a);
}

template <class T, class N>
void launch_kind(const SampleArgs& args, int64_t* errors, Stream stream) {
  const DistributionArgs& d = args.dist;
  const int width = int(d.width);
  const N* logits = static_cast<const N*>(d.logits);
  int64_t* integers = static_cast<int64_t*>(args.actions);
  if (d.kind == Distribution::categorical)
    launch_sample<T>(args, Categorical<T, N>{logits, d.action_mask, integers, width, make_parts(d)}, errors, stream);
  else if (d.kind == Distribution::bernoulli)
    launch_sample<T>(args, Bernoulli<T, N>{logits, d.action_mask, integers, width}, errors, stream);
  else
    launch_sample<T>(args,
                     Normal<T, N>{static_cast<const N*>(d.mean), static_cast<const N*>(d.log_std),
                                  static_cast<T*>(args.actions), width, d.per_sample_log_std},
                     errors, stream);
}

}  // namespace

void sample(const SampleArgs& args, int64_t* errors, Stream stream) {
  if (args.batch <= 0) return;
  dispatch(args.dtype, args.network_dtype, [&](auto type, auto network_type) {
    launch_kind<typename decltype(type)::type, typename decltype(network_type)::type>(args, errors, stream);
  });
}

}  // namespace pyppo::cuda
