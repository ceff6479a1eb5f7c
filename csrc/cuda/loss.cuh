// What every PPO loss does around its log-probs: weights, advantage normalisation, the surrogate with its derivatives,
// the value gradient, and the sums that become the metrics.
//
// One launch: the loss with its gradients, whose last block adds up what all blocks or warps left in the workspace;
// many such sums are added up by more blocks, in a launch after it. Where a weight sum or a normalisation needs the
// whole batch's moments, each block sums up those of a small batch by itself; those of a large one are a launch before.
// Each adds in a fixed order, in double.
#pragma once

#include <math.h>

#include "../math/surrogate.h"
#include "reduce.cuh"

namespace pyppo::cuda {

constexpr int loss_threads = 128;  // of a block
constexpr int num_sums = 6;        // policy, value, entropy, approx_kl, clipped, kl: LossStat from stat_policy on
constexpr int moment_blocks = 256;
// A batch up to this is read by every block, to save a launch: a guess, not measured.
constexpr int64_t own_moments_rows = 4096;

// One block's share of the batch.
struct BatchMoments {
  double rows, weight_sum;          // rows whose weight is not 0
  double mean, squared_deviations;  // of their advantages; left out unless these are normalised
};

// LossArgs as kernels read them, but for what has the network's type.
template <class T>
struct LossView {
  int64_t batch;
  const T *old_logp, *advantages, *old_values, *returns;
  const uint8_t* row_mask;
  const T* weights;
  const T* denominator_ptr;
  double denominator;  // NaN: the sum of weights
  math::SurrogateOptions<T> options;
  bool normalize_advantages;
  double ent_coef, vf_coef;
  const BatchMoments* moments;  // [num_moments]
  int num_moments;              // 0: not needed, or own
  bool own_moments;             // each block sums them up from the rows
  T* stats;
};

// What the whole batch says about each of its samples.
struct LossScale {
  double denominator, inverse_denominator;
  double advantage_mean, advantage_scale;  // A becomes (A - mean) * scale
};

// The derivatives of the loss by one sample's log-prob, entropy and KL.
template <class T>
struct SampleGradient {
  T logp, entropy, kl;
};

template <class T>
__device__ inline T row_weight(const LossView<T>& loss, int64_t row) {
  if (loss.row_mask != nullptr) return loss.row_mask[row] != 0 ? T(1) : T(0);
  return loss.weights == nullptr ? T(1) : loss.weights[row];
}

// The moments of a stretch of rows. Every thread of the block must call it and gets them; advantages are read a second
// time for the deviations from their mean.
template <int threads, class T>
__device__ inline BatchMoments stretch_moments(const LossView<T>& loss, int64_t first, int64_t end) {
  double sums[3] = {};  // rows, weights, advantages
#pragma unroll 4
  for (int64_t row = first + threadIdx.x; row < end; row += threads) {
    const T weight = row_weight(loss, row);
    if (weight == T(0)) continue;
    sums[0] += 1;
    sums[1] += double(weight);
    if (loss.normalize_advantages) sums[2] += double(loss.advantages[row]);
  }
  block_sum<threads>(sums);
  const double mean = sums[0] > 0 ? sums[2] / sums[0] : 0.0;
  double squares[1] = {};
  if (loss.normalize_advantages) {
#pragma unroll 4
    for (int64_t row = first + threadIdx.x; row < end; row += threads) {
      if (row_weight(loss, row) == T(0)) continue;
      const double deviation = double(loss.advantages[row]) - mean;
      squares[0] += deviation * deviation;
    }
    block_sum<threads>(squares);
  }
  return {sums[0], sums[1], mean, squares[0]};
}

// The same from what the blocks of a launch before have.
template <class T>
__device__ inline BatchMoments merged_moments(const LossView<T>& loss) {
  double sums[3] = {};  // rows, weights, advantages
  for (int i = threadIdx.x; i < loss.num_moments; i += loss_threads) {
    const BatchMoments m = loss.moments[i];
    sums[0] += m.rows;
    sums[1] += m.weight_sum;
    sums[2] += m.rows * m.mean;
  }
  block_sum<loss_threads>(sums);
  const double mean = sums[0] > 0 ? sums[2] / sums[0] : 0.0;
  double squares[1] = {};
  if (loss.normalize_advantages) {
    for (int i = threadIdx.x; i < loss.num_moments; i += loss_threads) {
      const BatchMoments m = loss.moments[i];
      squares[0] += m.squared_deviations + m.rows * (m.mean - mean) * (m.mean - mean);
    }
    block_sum<loss_threads>(squares);
  }
  return {sums[0], sums[1], mean, squares[0]};
}

// Every thread of the block must call it, and gets the same bits in each block.
template <class T>
__device__ inline LossScale loss_scale(const LossView<T>& loss) {
  LossScale out{double(loss.batch), 0.0, 0.0, 1.0};
  if (loss.own_moments || loss.num_moments > 0) {
    const BatchMoments all =
        loss.own_moments ? stretch_moments<loss_threads>(loss, 0, loss.batch) : merged_moments(loss);
    out.denominator = all.weight_sum;
    if (loss.normalize_advantages && all.rows >= 2) {
      out.advantage_mean = all.mean;
      out.advantage_scale = math::advantage_scale(all.squared_deviations, all.rows);
    }
  }
  if (!isnan(loss.denominator)) out.denominator = loss.denominator;
  if (loss.denominator_ptr != nullptr) out.denominator = double(*loss.denominator_ptr);
  out.inverse_denominator = out.denominator != 0 ? 1.0 / out.denominator : 0.0;
  return out;
}

// One sample whose weight is not 0. Adds its terms to `sums` and returns its gradients; `d_value` is the value's.
template <class T>
__device__ inline SampleGradient<T> sample_loss(const LossView<T>& loss, const LossScale& scale, int64_t row, T weight,
                                                T logp, T entropy, T kl, T value, double (&sums)[num_sums],
                                                T& d_value) {
  math::SurrogateSample<T> s;
  s.logp = logp;
  s.old_logp = loss.old_logp[row];
  s.advantage = math::normalize_advantage(loss.advantages[row], scale.advantage_mean, scale.advantage_scale);
  s.entropy = entropy;
  s.kl = kl;
  s.value = value;
  s.old_value = loss.old_values != nullptr ? loss.old_values[row] : T(0);
  s.target = loss.returns != nullptr ? loss.returns[row] : T(0);
  const math::SurrogateTerms<T> terms = math::surrogate(loss.options, s);
  const double w = double(weight);
  sums[stat_policy - stat_policy] += w * double(terms.policy);
  sums[stat_value - stat_policy] += w * double(terms.value);
  sums[stat_entropy - stat_policy] += w * double(entropy);
  sums[stat_approx_kl - stat_policy] += w * double(terms.approx_kl);
  sums[stat_clip_fraction - stat_policy] += w * double(terms.clipped);
  sums[stat_kl - stat_policy] += w * double(kl);
  const T scaled = weight * T(scale.inverse_denominator);
  d_value = scaled * terms.d_value;
  return {scaled * terms.d_logp, scaled * terms.d_entropy, scaled * terms.d_kl};
}

__device__ inline void store_sums(double* to, const double (&sums)[num_sums]) {
#pragma unroll
  for (int k = 0; k < num_sums; ++k) to[k] = sums[k];
}

// --- what becomes of the sums ----------------------------------------------------------------------------------------

// What a loss kernel's blocks or warps leave, and where it goes.
struct PartialSums {
  double* sums;  // [parts, columns]: num_sums, then a shared log_std's gradient
  int64_t parts, columns;
  void* d_log_std;  // nullable
  DType log_std_dtype;
  unsigned* arrivals;  // for the last block to add them up; null: a launch of its own does
};

__device__ inline void store_as(DType dtype, void* to, int64_t i, double x) {
  if (dtype == DType::f64)
    static_cast<double*>(to)[i] = x;
  else if (dtype == DType::f16)
    static_cast<__half*>(to)[i] = __half(float(x));
  else if (dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(to)[i] = __nv_bfloat16(float(x));
  else
    static_cast<float*>(to)[i] = float(x);
}

template <class T>
__device__ inline void store_stats(const LossView<T>& loss, const LossScale& scale, const double (&sums)[num_sums]) {
#pragma unroll
  for (int k = 0; k < num_sums; ++k) loss.stats[stat_policy + k] = T(sums[k] * scale.inverse_denominator);
  const double total = sums[0] + loss.vf_coef * sums[1] - loss.ent_coef * sums[2];
  loss.stats[stat_loss] = T(total * scale.inverse_denominator);
  loss.stats[stat_denominator] = T(scale.denominator);
}

// Adds up a group of num_sums columns over the parts, and stores the metrics (group 0) or so much of a shared log_std's
// gradient. Every thread of the block must call it.
template <class T>
__device__ inline void finish_columns(const LossView<T>& loss, const LossScale& scale, const PartialSums& partial,
                                      int64_t group) {
  const int64_t first = group * num_sums;
  const int count = int(smaller<int64_t>(num_sums, partial.columns - first));
  double sums[num_sums] = {};
#pragma unroll 1
  for (int64_t part = threadIdx.x; part < partial.parts; part += loss_threads) {
    const double* from = partial.sums + part * partial.columns + first;
#pragma unroll
    for (int k = 0; k < num_sums; ++k)
      if (k < count) sums[k] += other_blocks(from + k);
  }
  block_sum<loss_threads>(sums);
  if (threadIdx.x != 0) return;
  if (group == 0) return store_stats(loss, scale, sums);
#pragma unroll
  for (int k = 0; k < num_sums; ++k)
    if (k < count) store_as(partial.log_std_dtype, partial.d_log_std, first + k - num_sums, sums[k]);
}

// The end of a loss kernel. Every thread of the block must call it.
template <class T>
__device__ inline void finish_loss(const LossView<T>& loss, const LossScale& scale, const PartialSums& partial) {
  if (partial.arrivals == nullptr || !last_block(partial.arrivals)) return;
#pragma unroll 1
  for (int64_t group = 0; group * num_sums < partial.columns; ++group) finish_columns(loss, scale, partial, group);
}

// --- host side, in loss.cu -------------------------------------------------------------------------------------------

// The loss' workspace: the moments, then rows of partial sums.
struct LossPlan {
  int num_moments;
  bool own_moments;
  int64_t parts;    // rows of partial sums that the loss kernel writes
  int64_t columns;  // of a row: num_sums, then a shared log_std's gradient [D]

  size_t bytes() const { return size_t(num_moments) * sizeof(BatchMoments) + size_t(parts * columns) * sizeof(double); }
};

LossPlan loss_plan(const LossArgs& args, int64_t parts, int64_t shared_log_stds);

template <class T>
LossView<T> loss_view(const LossArgs& args, const LossPlan& plan, void* workspace);

// The moments, where the plan has any apart from the loss.
template <class T>
void launch_moments(const LossView<T>& loss, Stream stream);

// d_log_std: the gradient of a shared log_std, where the plan has columns for it.
PartialSums partial_sums(const LossPlan& plan, void* workspace, void* d_log_std, DType log_std_dtype, Stream stream);

// Adds up the sums, where the loss kernel has not done it.
template <class T>
void launch_finish(const LossView<T>& loss, const PartialSums& partial, Stream stream);

}  // namespace pyppo::cuda
