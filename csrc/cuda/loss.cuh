// What every PPO loss does around its log-probs: weights, advantage normalisation, the surrogate with its derivatives,
// the value gradient, and the sums that become the metrics.
//
// Two launches: the loss with its gradients, and one that adds up what its blocks or warps left in the workspace. Where
// a weight sum or a normalisation needs the whole batch's moments, each block sums up those of a small batch by itself;
// those of a large one are one launch more, before. Each adds in a fixed order, in double.
#pragma once

#include <math.h>

#include "../math/surrogate.h"
#include "reduce.cuh"

namespace pyppo::cuda {

constexpr int num_sums = 6;  // policy, value, entropy, approx_kl, clipped, kl: LossStat from stat_policy on
constexpr int moment_blocks = 256;
// A batch up to this is read by every block, mostly from caches: about as long as a launch takes.
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
template <int threads, class T>
__device__ inline BatchMoments merged_moments(const LossView<T>& loss) {
  double sums[3] = {};  // rows, weights, advantages
  for (int i = threadIdx.x; i < loss.num_moments; i += threads) {
    const BatchMoments m = loss.moments[i];
    sums[0] += m.rows;
    sums[1] += m.weight_sum;
    sums[2] += m.rows * m.mean;
  }
  block_sum<threads>(sums);
  const double mean = sums[0] > 0 ? sums[2] / sums[0] : 0.0;
  double squares[1] = {};
  if (loss.normalize_advantages) {
    for (int i = threadIdx.x; i < loss.num_moments; i += threads) {
      const BatchMoments m = loss.moments[i];
      squares[0] += m.squared_deviations + m.rows * (m.mean - mean) * (m.mean - mean);
    }
    block_sum<threads>(squares);
  }
  return {sums[0], sums[1], mean, squares[0]};
}

// Every thread of the block must call it, and gets the same bits in each block.
template <int threads, class T>
__device__ inline LossScale loss_scale(const LossView<T>& loss) {
  LossScale out{double(loss.batch), 0.0, 0.0, 1.0};
  if (loss.own_moments || loss.num_moments > 0) {
    const BatchMoments all =
        loss.own_moments ? stretch_moments<threads>(loss, 0, loss.batch) : merged_moments<threads>(loss);
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

// --- host side, in loss.cu -------------------------------------------------------------------------------------------

// The loss' workspace: the moments, then rows of partial sums.
struct LossPlan {
  int num_moments;
  bool own_moments;
  int64_t parts;    // rows of partial sums that the loss kernel writes
  int64_t columns;  // of a row: num_sums, then a shared log_std's gradient [D]

  size_t bytes() const { return size_t(num_moments) * sizeof(BatchMoments) + size_t(parts * columns) * sizeof(double); }
  double* partial_sums(void* workspace) const {
    return reinterpret_cast<double*>(static_cast<BatchMoments*>(workspace) + num_moments);
  }
};

LossPlan loss_plan(const LossArgs& args, int64_t parts, int64_t shared_log_stds);

template <class T>
LossView<T> loss_view(const LossArgs& args, const LossPlan& plan, void* workspace);

// The moments, where the plan has any apart from the loss.
template <class T>
void launch_moments(const LossView<T>& loss, Stream stream);

// The metrics, and the gradient of a shared log_std where the plan has columns for it.
template <class T>
void launch_finish(const LossView<T>& loss, const LossPlan& plan, void* workspace, void* d_log_std, DType log_std_dtype,
                   Stream stream);

}  // namespace pyppo::cuda
