// What every PPO loss does around its log-probs, a tile at a time: weights, advantage normalisation, the surrogate with
// its derivatives, the value gradient, and the sums that become the metrics.
#pragma once

#include <math.h>

#include "../loss_options.h"
#include "../math/surrogate.h"
#include "action_tile.h"
#include "isa.h"
#include "memory.h"
#include "tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

constexpr int num_sums = 6;  // policy, value, entropy, approx_kl, clipped, kl: LossStat from stat_policy on

// What a whole batch needs before its first sample: the weights' sum and the advantages' moments.
struct BatchMoments {
  double denominator;
  double advantage_mean, advantage_scale;  // A becomes (A - mean) * scale
};

template <class T>
inline bool row_counts(const LossArgs& a, int64_t row) {
  if (a.row_mask != nullptr) return a.row_mask[row] != 0;
  return a.weights == nullptr || static_cast<const T*>(a.weights)[row] != T(0);
}

template <class T>
inline T row_weight(const LossArgs& a, int64_t row) {
  if (a.row_mask != nullptr) return a.row_mask[row] != 0 ? T(1) : T(0);
  return a.weights == nullptr ? T(1) : static_cast<const T*>(a.weights)[row];
}

// Sums f(row) over the rows [begin, end) that count, in 64 interleaved partial sums: one order whatever the vector
// width.
template <class T, class F>
inline double sum_range(const LossArgs& a, int64_t begin, int64_t end, const F& f) {
  constexpr int lanes = 64;
  const bool all = a.row_mask == nullptr && a.weights == nullptr;
  double sums[lanes] = {};
  for (int64_t first = begin; first < end; first += lanes) {
    const int count = end - first < lanes ? int(end - first) : lanes;
    if (all && count == lanes) {
#pragma GCC ivdep
      for (int i = 0; i < lanes; ++i) sums[i] += f(first + i);
    } else {
      for (int i = 0; i < count; ++i) sums[i] += row_counts<T>(a, first + i) ? f(first + i) : 0.0;
    }
  }
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// The same over the whole batch: fixed blocks, added in order, the same bits for any number of threads.
template <class T, class F>
inline double sum_rows(const LossArgs& a, const F& f) {
  constexpr int64_t block = 65536;
  const int64_t blocks = (a.batch + block - 1) / block;
  if (blocks <= 1) return sum_range<T>(a, 0, a.batch, f);
  const Scratch<double> partial(static_cast<size_t>(blocks));
  parallel_for(blocks, double(a.batch) * 1e-3, [&](int64_t b) {
    const int64_t end = (b + 1) * block < a.batch ? (b + 1) * block : a.batch;
    partial.get()[b] = sum_range<T>(a, b * block, end, f);
  });
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial.get()[b];
  return sum;
}

template <class T>
inline BatchMoments batch_moments(const LossArgs& a) {
  BatchMoments m{a.denominator, 0.0, 1.0};
  const bool all = a.row_mask == nullptr && a.weights == nullptr;
  if (a.denominator_ptr != nullptr) m.denominator = double(*static_cast<const T*>(a.denominator_ptr));
  if (isnan(a.denominator) && a.denominator_ptr == nullptr) {
    m.denominator = all ? double(a.batch) : sum_rows<T>(a, [&](int64_t i) { return double(row_weight<T>(a, i)); });
  }
  if (!a.normalize_advantages) return m;
  const T* advantages = static_cast<const T*>(a.advantages);
  const double count = all ? double(a.batch) : sum_rows<T>(a, [](int64_t) { return 1.0; });
  if (count < 2) return m;
  m.advantage_mean = sum_rows<T>(a, [&](int64_t i) { return double(advantages[i]); }) / count;
  const double squares = sum_rows<T>(a, [&](int64_t i) {
    const double d = double(advantages[i]) - m.advantage_mean;
    return d * d;
  });
  m.advantage_scale = math::advantage_scale(squares, count);
  return m;
}

// The rows of a loss tile that count, with their weights; the rest of the tile is dead.
template <class T, int L>
struct LossRows {
  TileRows<L> rows;
  alignas(64) T weight[L];
};

template <class T, int L>
inline LossRows<T, L> loss_rows(const LossArgs& a, int64_t first, int64_t end) {
  LossRows<T, L> out;
  out.rows = rows_from<L>(first, end);
  PYPPO_LANES(i) out.weight[i] = T(1);
  for (int i = out.rows.count; i < L; ++i) out.weight[i] = T(0);
  if (a.row_mask == nullptr && a.weights == nullptr) return out;
  for (int i = 0; i < out.rows.count; ++i) {
    out.weight[i] = row_weight<T>(a, first + i);
    out.rows.live[i] = out.weight[i] != T(0);
    out.rows.all_live = out.rows.all_live && out.rows.live[i];
  }
  return out;
}

template <class T, int L>
class LossTile {
 public:
  // `with_kl`: whether the distribution's KL is measured.
  LossTile(const LossArgs& args, const BatchMoments& moments, bool with_kl)
      : a_(args),
        moments_(moments),
        options_(surrogate_options<T>(args)),
        plain_(options_.clips && !options_.extras && !with_kl && args.row_mask == nullptr && args.weights == nullptr) {}

  // From a tile's log-probs, entropies and KLs to their gradients and the values'.
  void surrogate(const LossRows<T, L>& r, TileTerms<T, L>& terms, TileGradients<T, L>& g) {
    // A dead lane must stay finite: 0 times an infinite ratio would reach the sums.
    clear_dead(terms.logp, r.rows, 1);
    clear_dead(terms.entropy, r.rows, 1);
    clear_dead(terms.kl, r.rows, 1);
    if (plain_ && r.rows.all_live)
      compute<true>(r, terms, g);
    else
      compute<false>(r, terms, g);
  }

  void add_sums_to(double* sums) const {
    for (int k = 0; k < num_sums; ++k) sums[k] += sum_lanes<L>(sums_[k]);
  }

 private:
  // `plain`: the clipped loss without extras, weights and KL, as most runs have it. Two thirds of the general one's
  // instructions.
  template <bool plain>
  void compute(const LossRows<T, L>& r, const TileTerms<T, L>& terms, TileGradients<T, L>& g) {
    alignas(64) T buffers[6][L];
    const T* __restrict old_logp = lanes(a_.old_logp, r.rows, buffers[0]);
    const T* __restrict advantage = lanes(a_.advantages, r.rows, buffers[1]);
    const T* __restrict value = lanes(a_.values, r.rows, buffers[2]);
    const T* __restrict target = lanes(a_.returns, r.rows, buffers[3]);
    const T* __restrict old_value = lanes(a_.old_values, r.rows, buffers[4]);
    const bool in_place = a_.d_values != nullptr && r.rows.count == L;
    T* __restrict d_value = in_place ? static_cast<T*>(a_.d_values) + r.rows.first : buffers[5];
    // Copies that no store can alias, or the loop would not become vector code.
    math::SurrogateOptions<T> options = options_;
    options.extras = !plain;
    options.clips = plain || options.clips;
    const double mean = moments_.advantage_mean, scale = moments_.advantage_scale;
    const T inverse = moments_.denominator != 0 ? T(1.0 / moments_.denominator) : T(0);
    T(*__restrict sums)[L] = sums_;
    PYPPO_LANES(i) {
      const T kl = plain ? T(0) : terms.kl[i];
      const math::SurrogateTerms<T> s =
          math::surrogate(options, {terms.logp[i], old_logp[i], math::normalize_advantage(advantage[i], mean, scale),
                                    terms.entropy[i], kl, value[i], plain ? T(0) : old_value[i], target[i]});
      const T w = plain ? T(1) : r.weight[i], scaled = w * inverse;
      sums[0][i] += w * s.policy;
      sums[1][i] += w * s.value;
      sums[2][i] += w * terms.entropy[i];
      sums[3][i] += w * s.approx_kl;
      sums[4][i] += w * s.clipped;
      if (!plain) sums[5][i] += w * kl;
      g.logp[i] = scaled * s.d_logp;
      g.entropy[i] = scaled * s.d_entropy;
      g.kl[i] = scaled * s.d_kl;
      d_value[i] = scaled * s.d_value;
    }
    if (a_.d_values != nullptr && !in_place)
      store_tile<L>(static_cast<T*>(a_.d_values) + r.rows.first, d_value, r.rows.count, 1);
  }

  // A tile's rows of an input: where they are if all count, else a copy with zeros for those that do not.
  static const T* lanes(const void* floats, const TileRows<L>& rows, T* buffer) {
    if (floats == nullptr) {
      PYPPO_LANES(i) buffer[i] = T(0);
      return buffer;
    }
    const T* first = static_cast<const T*>(floats) + rows.first;
    if (rows.all_live) return first;
    load_tile<L>(buffer, first, rows.count, 1);
    clear_dead(buffer, rows, 1);
    return buffer;
  }

  const LossArgs& a_;
  const BatchMoments& moments_;
  const math::SurrogateOptions<T> options_;
  const bool plain_;
  alignas(64) T sums_[num_sums][L] = {};
};

// Means and the loss, from the blocks' sums in their order.
template <class T>
inline void finish_stats(const LossArgs& a, const BatchMoments& m, const double* sums, int64_t blocks) {
  double total[num_sums] = {};
  for (int64_t b = 0; b < blocks; ++b)
    for (int k = 0; k < num_sums; ++k) total[k] += sums[b * num_sums + k];
  const double inverse = m.denominator != 0 ? 1.0 / m.denominator : 0.0;
  T* stats = static_cast<T*>(a.stats);
  for (int k = 0; k < num_sums; ++k) stats[stat_policy + k] = T(total[k] * inverse);
  const double vf_coef = a.values != nullptr ? a.vf_coef : 0.0;
  stats[stat_loss] = T(math::total_loss(total[0], total[1], total[2], vf_coef, a.ent_coef) * inverse);
  stats[stat_denominator] = T(m.denominator);
}

}  // namespace
}  // namespace pyppo::cpu
