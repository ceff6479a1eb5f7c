// The fused PPO loss on a GPU: log-prob, entropy, KL, surrogate and value loss with their gradients, in one pass.
#include "distributions.cuh"

namespace pyppo::cuda {
namespace {

constexpr int warps = loss_threads / warp_size;
constexpr int64_t max_blocks = 1024;  // of tiles
constexpr int64_t max_warps = 1364;   // of rows; each leaves partial sums, as many as one block can add up
constexpr int64_t max_partial_sums = 4 << 20;
constexpr int64_t thread_width = 32;         // wider rows are a warp's
constexpr int64_t thread_parts_width = 256;  // unless they have many small parts, which would leave its lanes idle

// How each kind of distribution lies in the caller's tensors: from there to a tile and back, and its rows.
template <class T, class N>
struct Categorical {
  const N *logits, *old_logits;
  const uint8_t* mask;
  const void* actions;
  int action_bytes;
  N* d_logits;
  int width;
  Parts parts;

  static constexpr int slots(bool has_old) { return has_old ? 2 : 1; }

  __device__ void load(const Tile<T>& tile, int64_t first, int count) const {
    const int64_t at = first * width;
    const LogitRow<T, N> now{logits + at, mask != nullptr ? mask + at : nullptr};
    tile.fill(0, count, [&](int element) { return now(element); });
    if (old_logits == nullptr) return;
    const LogitRow<T, N> old{old_logits + at, now.mask};
    tile.fill(1, count, [&](int element) { return old(element); });
  }

  __device__ auto staged_row(const Tile<T>& tile, int r, int64_t row) const {
    T* now = tile.row(0, r);
    const uint8_t* allowed = mask != nullptr ? mask + row * width : nullptr;
    return CategoricalRow<OneThread, T, T>{parts,
                                           {now, nullptr},
                                           {old_logits != nullptr ? tile.row(1, r) : nullptr, nullptr},
                                           allowed,
                                           actions,
                                           action_bytes,
                                           row * parts.count,
                                           now,
                                           {},
                                           {}};
  }

  __device__ auto direct_row(int64_t row, double*) const {
    const int64_t at = row * width;
    const uint8_t* allowed = mask != nullptr ? mask + at : nullptr;
    return CategoricalRow<Warp, T, N>{parts,
                                      {logits + at, allowed},
                                      {old_logits != nullptr ? old_logits + at : nullptr, allowed},
                                      allowed,
                                      actions,
                                      action_bytes,
                                      row * parts.count,
                                      d_logits + at,
                                      {},
                                      {}};
  }

  __device__ void store(const Tile<T>& tile, int64_t first, int count) const {
    tile.store(0, count, d_logits + first * width);
  }

  __device__ static bool shares_log_std() { return false; }
};

template <class T, class N>
struct Bernoulli {
  const N *logits, *old_logits;
  const uint8_t* mask;
  const void* actions;
  int action_bytes;
  N* d_logits;
  int width;

  static constexpr int slots(bool has_old) { return has_old ? 3 : 2; }

  __device__ void load(const Tile<T>& tile, int64_t first, int count) const {
    const int64_t at = first * width;
    const LogitRow<T, N> now{logits + at, mask != nullptr ? mask + at : nullptr};
    tile.fill(0, count, [&](int element) { return now(element); });
    tile.fill(1, count, [&](int element) { return T(bit_code(actions, action_bytes, at + element, mask)); });
    if (old_logits == nullptr) return;
    const LogitRow<T, N> old{old_logits + at, now.mask};
    tile.fill(2, count, [&](int element) { return old(element); });
  }

  __device__ auto staged_row(const Tile<T>& tile, int r, int64_t) const {
    T* now = tile.row(0, r);
    return BernoulliRow<OneThread, T, T, StagedBits<T>>{
        width, {now, nullptr}, {old_logits != nullptr ? tile.row(2, r) : nullptr, nullptr}, {tile.row(1, r)}, now};
  }

  __device__ auto direct_row(int64_t row, double*) const {
    const int64_t at = row * width;
    const uint8_t* allowed = mask != nullptr ? mask + at : nullptr;
    return BernoulliRow<Warp, T, N, StoredBits>{width,
                                                {logits + at, allowed},
                                                {old_logits != nullptr ? old_logits + at : nullptr, allowed},
                                                {actions, action_bytes, at, mask},
                                                d_logits + at};
  }

  __device__ void store(const Tile<T>& tile, int64_t first, int count) const {
    tile.store(0, count, d_logits + first * width);
  }

  __device__ static bool shares_log_std() { return false; }
};

// In a tile, the gradients of the means take their place; those of a shared log_std, row by row, that of the actions.
template <class T, class N>
struct Normal {
  const N *mean, *log_std, *old_mean, *old_log_std;
  const T* actions;
  N *d_mean, *d_log_std;
  int width;
  bool per_sample;  // log_std

  static constexpr int mean_slot = 0, action_slot = 1, log_std_slot = 2, old_mean_slot = 3, old_log_std_slot = 4;
  static constexpr int slots(bool has_old) { return has_old ? 5 : 3; }

  __device__ void load_floats(const Tile<T>& tile, int slot, int count, const N* from) const {
    tile.fill(slot, count, [&](int element) { return T(from[element]); });
  }

  __device__ void load(const Tile<T>& tile, int64_t first, int count) const {
    const int64_t at = first * width, log_std_at = per_sample ? at : 0;
    const int log_std_rows = per_sample ? count : 1;
    load_floats(tile, mean_slot, count, mean + at);
    tile.fill(action_slot, count, [&](int element) { return actions[at + element]; });
    load_floats(tile, log_std_slot, log_std_rows, log_std + log_std_at);
    if (old_mean == nullptr) return;
    load_floats(tile, old_mean_slot, count, old_mean + at);
    load_floats(tile, old_log_std_slot, log_std_rows, old_log_std + log_std_at);
  }

  __device__ auto staged_row(const Tile<T>& tile, int r, int64_t) const {
    const bool has_old = old_mean != nullptr;
    const int log_std_r = per_sample ? r : 0;
    T* means = tile.row(mean_slot, r);
    T* log_stds = tile.row(log_std_slot, log_std_r);
    T* action_row = tile.row(action_slot, r);
    return NormalRow<OneThread, T, T>{width,
                                      means,
                                      log_stds,
                                      has_old ? tile.row(old_mean_slot, r) : nullptr,
                                      has_old ? tile.row(old_log_std_slot, log_std_r) : nullptr,
                                      action_row,
                                      means,
                                      per_sample ? log_stds : action_row,
                                      nullptr};
  }

  __device__ auto direct_row(int64_t row, double* log_std_sums) const {
    const int64_t at = row * width, log_std_at = per_sample ? at : 0;
    const bool has_old = old_mean != nullptr;
    return NormalRow<Warp, T, N>{width,
                                 mean + at,
                                 log_std + log_std_at,
                                 has_old ? old_mean + at : nullptr,
                                 has_old ? old_log_std + log_std_at : nullptr,
                                 actions + at,
                                 d_mean + at,
                                 per_sample ? d_log_std + at : nullptr,
                                 per_sample ? nullptr : log_std_sums};
  }

  __device__ void store(const Tile<T>& tile, int64_t first, int count) const {
    tile.store(mean_slot, count, d_mean + first * width);
    if (per_sample) tile.store(log_std_slot, count, d_log_std + first * width);
  }

  __device__ bool shares_log_std() const { return !per_sample; }
};

template <class Dist, class T, class N>
struct PpoKernelArgs {
  LossView<T> loss;
  Dist dist;
  const N* values;
  N* d_values;
  ErrorFlags errors;
  PartialSums partial;  // a part a block of tiles, or a warp
  int tile_rows;
};

template <class Team, class Dist, class Row, class T, class N>
__device__ void row_loss(const PpoKernelArgs<Dist, T, N>& a, const LossScale& scale, int64_t row, Row&& sample,
                         double (&sums)[num_sums]) {
  const T weight = row_weight(a.loss, row);
  T d_value = T(0);
  if (weight == T(0)) {
    sample.clear();  // whatever the row holds
  } else {
    const RowTerms<T> terms = sample.terms(a.errors, row);
    const T value = a.values != nullptr ? T(a.values[row]) : T(0);
    sample.backward(sample_loss(a.loss, scale, row, weight, terms.logp, terms.entropy, terms.kl, value, sums, d_value));
  }
  if (a.d_values != nullptr && Team::lane() == 0) a.d_values[row] = N(d_value);
}

// Adds up the columns of a slot, each by one warp and in one order. Lane i of warp w keeps column w + i * warps.
template <class T>
__device__ void add_columns(const Tile<T>& tile, int slot, int count, double& kept) {
  const int lane = threadIdx.x % warp_size;
  int i = 0;
  for (int column = threadIdx.x / warp_size; column < tile.width; column += warps, ++i) {
    double sum = 0;
    for (int r = lane; r < count; r += warp_size) sum += double(tile.row(slot, r)[column]);
    sum = warp_sum(sum);
    if (lane == i) kept += sum;
  }
}

// Narrow rows: a thread a row.
template <class Dist, class T, class N>
__global__ __launch_bounds__(loss_threads,
                             sizeof(T) == 4 ? 6
                                            : 4) void tile_kernel(const __grid_constant__ PpoKernelArgs<Dist, T, N> a) {
  const Tile<T> tile{dynamic_shared<T>(), a.tile_rows, a.dist.width};
  const LossScale scale = loss_scale(a.loss);
  double sums[num_sums] = {}, log_std_sum = 0;
  const int64_t step = int64_t(gridDim.x) * tile.rows;
  for (int64_t first = int64_t(blockIdx.x) * tile.rows; first < a.loss.batch; first += step) {
    const int count = int(smaller<int64_t>(tile.rows, a.loss.batch - first)), r = threadIdx.x;
    a.dist.load(tile, first, count);
    __syncthreads();
    if (r < count) row_loss<OneThread>(a, scale, first + r, a.dist.staged_row(tile, r, first + r), sums);
    __syncthreads();
    a.dist.store(tile, first, count);
    if (a.dist.shares_log_std()) add_columns(tile, 1, count, log_std_sum);
    __syncthreads();
  }
  block_sum<loss_threads>(sums);
  double* partial = a.partial.sums + blockIdx.x * a.partial.columns;
  if (threadIdx.x == 0) store_sums(partial, sums);
  const int column = threadIdx.x / warp_size + threadIdx.x % warp_size * warps;
  if (a.dist.shares_log_std() && column < a.dist.width) partial[num_sums + column] = log_std_sum;
  finish_loss(a.loss, scale, a.partial);
}

// Wide rows: a warp a row.
template <class Dist, class T, class N>
__global__ __launch_bounds__(loss_threads,
                             sizeof(T) == 4 ? 6
                                            : 4) void warp_kernel(const __grid_constant__ PpoKernelArgs<Dist, T, N> a) {
  const LossScale scale = loss_scale(a.loss);
  const int64_t warp = int64_t(blockIdx.x) * warps + threadIdx.x / warp_size, step = int64_t(gridDim.x) * warps;
  double* partial = a.partial.sums + warp * a.partial.columns;
  double* log_std_sums = partial + num_sums;
  for (int64_t j = num_sums + Warp::lane(); j < a.partial.columns; j += warp_size)
    partial[j] = 0;  // this lane adds to it
  double sums[num_sums] = {};
  for (int64_t row = warp; row < a.loss.batch; row += step)
    row_loss<Warp>(a, scale, row, a.dist.direct_row(row, log_std_sums), sums);
  if (Warp::lane() == 0) store_sums(partial, sums);
  finish_loss(a.loss, scale, a.partial);
}

// Which kernel, and how much of it; of the shapes alone, so that the same input gives the same bits on any device.
struct PpoPlan {
  int tile_rows;  // 0: a warp a row
  size_t shared_bytes;
  int64_t blocks;
  LossPlan loss;
};

template <class T, template <class, class> class Dist>
PpoPlan plan_for(const PpoLossArgs& args) {
  const int64_t batch = args.loss.batch, width = args.dist.width;
  const bool many_parts = args.dist.kind == Distribution::categorical && args.dist.num_parts > 1;
  const bool shared_log_std = args.dist.kind == Distribution::normal && !args.dist.per_sample_log_std;
  const int64_t log_stds = shared_log_std ? width : 0;
  const int slots = Dist<T, T>::slots(args.old_logits != nullptr || args.old_mean != nullptr);
  PpoPlan p;
  p.tile_rows = tile_rows<T>(loss_threads, slots, width, many_parts ? thread_parts_width : thread_width);
  p.shared_bytes = p.tile_rows > 0 ? Tile<T>::bytes(slots, p.tile_rows, int(width)) : 0;
  if (p.tile_rows > 0) {
    p.blocks = smaller(max_blocks, ceil_div(batch, p.tile_rows));
    p.loss = loss_plan(args.loss, p.blocks, log_stds);
    return p;
  }
  const int64_t affordable = max_partial_sums / (num_sums + log_stds);
  const int64_t rows_at_once = smaller(batch, smaller(max_warps, affordable < warps ? warps : affordable));
  p.blocks = ceil_div(rows_at_once, warps);
  p.loss = loss_plan(args.loss, p.blocks * warps, log_stds);
  return p;
}

template <class T>
PpoPlan plan(const PpoLossArgs& args) {
  switch (args.dist.kind) {
    case Distribution::bernoulli:
      return plan_for<T, Bernoulli>(args);
    case Distribution::normal:
      return plan_for<T, Normal>(args);
    default:
      return plan_for<T, Categorical>(args);
  }
}

template <class T, class N, class Dist>
void launch_loss(const PpoLossArgs& args, const Dist& dist, void* workspace, int64_t* errors, Stream stream) {
  const PpoPlan p = plan<T>(args);
  PpoKernelArgs<Dist, T, N> a;
  a.loss = loss_view<T>(args.loss, p.loss, workspace);
  a.dist = dist;
  a.values = static_cast<const N*>(args.loss.values);
  a.d_values = static_cast<N*>(args.loss.d_values);
  a.errors = {errors};
  a.partial = partial_sums(p.loss, workspace, args.d_log_std, args.loss.network_dtype, stream);
  a.tile_rows = p.tile_rows;
  launch_moments(a.loss, stream);
  if (p.blocks > 0) {
    if (p.tile_rows > 0)
      launch("ppo_loss", tile_kernel<Dist, T, N>, p.blocks, loss_threads, p.shared_bytes, stream, a);
    else
      launch("ppo_loss (wide)", warp_kernel<Dist, T, N>, p.blocks, loss_threads, 0, stream, a);
  }
  launch_finish(a.loss, a.partial, stream);
}

template <class T, class N>
void launch_kind(const PpoLossArgs& args, void* workspace, int64_t* errors, Stream stream) {
  const DistributionArgs& d = args.dist;
  const int width = int(d.width);
  const N *logits = static_cast<const N*>(d.logits), *old_logits = static_cast<const N*>(args.old_logits);
  N* d_logits = static_cast<N*>(args.d_logits);
  if (d.kind == Distribution::categorical) {
    const Categorical<T, N> dist{logits,   old_logits, d.action_mask, args.actions, args.action_bytes,
                                 d_logits, width,      make_parts(d)};
    launch_loss<T, N>(args, dist, workspace, errors, stream);
  } else if (d.kind == Distribution::bernoulli) {
    const Bernoulli<T, N> dist{logits, old_logits, d.action_mask, args.actions, args.action_bytes, d_logits, width};
    launch_loss<T, N>(args, dist, workspace, errors, stream);
  } else {
    const Normal<T, N> dist{static_cast<const N*>(d.mean),
                            static_cast<const N*>(d.log_std),
                            static_cast<const N*>(args.old_mean),
                            static_cast<const N*>(args.old_log_std),
                            static_cast<const T*>(args.actions),
                            static_cast<N*>(args.d_mean),
                            static_cast<N*>(args.d_log_std),
                            width,
                            d.per_sample_log_std};
    launch_loss<T, N>(args, dist, workspace, errors, stream);
  }
}

}  // namespace

size_t ppo_loss_workspace(const PpoLossArgs& args) {
  return (args.loss.dtype == DType::f64 ? plan<double>(args) : plan<float>(args)).loss.bytes();
}

void ppo_loss(const PpoLossArgs& args, void* workspace, int64_t* errors, Stream stream) {
  dispatch(args.loss.dtype, args.loss.network_dtype, [&](auto type, auto network_type) {
    launch_kind<typename decltype(type)::type, typename decltype(network_type)::type>(args, workspace, errors, stream);
  });
}

}  // namespace pyppo::cuda
