// Categorical actions, one or several side by side, over one tile of samples.
#pragma once

#include "action_tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

// One or more categorical distributions side by side (nvec), each a softmax over its slice of the logits.
template <class T, int L>
class CategoricalTile {
 public:
  CategoricalTile(const DistributionArgs& d, bool with_old)
      : d_(d),
        with_old_(with_old),
        floats_(size_t((with_old ? 3 : 2) * d.width + 5 * d.num_parts) * L),
        actions_(size_t(d.num_parts) * L) {
    logits_ = floats_.get();
    exps_ = logits_ + d.width * L;
    old_ = exps_ + d.width * L;
    log_sum_ = old_ + (with_old ? d.width * L : 0);
    sum_ = log_sum_ + d.num_parts * L;
    inverse_ = sum_ + d.num_parts * L;
    entropy_ = inverse_ + d.num_parts * L;
    uniforms_ = entropy_ + d.num_parts * L;
  }

  void load(const TileRows<L>& rows) {
    load_logits<L>(logits_, d_, d_.logits, rows);
    for_parts([&](int64_t k, int64_t at) { softmax(k, at, rows); });
  }

  void load_old(const PpoLossArgs& a, const TileRows<L>& rows) { load_logits<L>(old_, d_, a.old_logits, rows); }

  void load_actions_of(const PpoLossArgs& a, const TileRows<L>& rows) {
    load_actions<L>(actions_.get(), a.actions, a.action_bytes, rows, d_.num_parts);
    for_parts([&](int64_t k, int64_t at) {
      const int32_t* action = actions_.get() + k * L;
      if (d_.action_mask == nullptr && !any_outside<L>(action, int32_t(d_.nvec[k]))) return;
      for (int i = 0; i < rows.count; ++i) {
        const bool inside = action[i] >= 0 && action[i] < d_.nvec[k];
        const bool allowed = inside && mask_allows(d_, rows.first + i, at + action[i]);
        if (!allowed && rows.live[i]) note_row(errors.action, rows.first + i);
      }
    });
  }

  void draw(const TileNoise<L>& noise, bool deterministic, const TileRows<L>& rows) {
    if (!deterministic) draw_uniforms<L>(uniforms_, noise, d_.num_parts);
    for_parts([&](int64_t k, int64_t at) {
      for (int i = 0; i < rows.count; ++i)
        if (!(sum_[k * L + i] > T(0))) note_row(errors.distribution, rows.first + i);
      if (deterministic)
        choose_mode(k, at);
      else
        choose_drawn(k, at);
    });
  }

  void store_actions(void* out, const TileRows<L>& rows) const {
    int64_t* actions = static_cast<int64_t*>(out) + rows.first * d_.num_parts;
    store_tile<L>(actions, actions_.get(), rows.count, d_.num_parts);
  }

  void terms(TileTerms<T, L>& out) const {
    for_parts([&](int64_t k, int64_t at) {
      const int32_t* action = actions_.get() + k * L;
      alignas(64) T chosen[L];
      PYPPO_LANES(i) chosen[i] = T(0);
      for_runs(0, d_.nvec[k], [&](auto run, int64_t j) {
        const T* __restrict logits = logits_ + (at + j) * L;
        PYPPO_LANES(i) {
          T logit = chosen[i];
          for_columns(run, [&](int c) PYPPO_INLINE {
            const T x = logits[c * L + i];
            logit = action[i] == int32_t(j) + c ? x : logit;
          });
          chosen[i] = logit;
        }
      });
      const T *log_sum = log_sum_ + k * L, *entropy = entropy_ + k * L;
      PYPPO_LANES(i) {
        out.logp[i] += chosen[i] - log_sum[i];
        out.entropy[i] += entropy[i];
      }
      if (with_old_) old_terms(k, at, out);
    });
  }

  // Leaves the gradient where the logits were.
  void backward(const TileGradients<T, L>& g) {
    for_parts([&](int64_t k, int64_t at) {
      if (differentiate_kl)
        backward_part<true>(k, at, g);
      else
        backward_part<false>(k, at, g);
    });
  }

  void store_gradients(const PpoLossArgs& a, const TileRows<L>& rows) const {
    store_tile<L>(static_cast<T*>(a.d_logits) + rows.first * d_.width, logits_, rows.count, d_.width);
  }

  RowErrors errors;
  bool differentiate_kl = false;  // else the KL is only measured

 private:
  template <class F>
  void for_parts(F&& f) const {
    for (int64_t k = 0, at = 0; k < d_.num_parts; at += d_.nvec[k++]) f(k, at);
  }

  // Logits less their maximum, their exponentials, and the sums over part k, whose logits begin at `at`.
  void softmax(int64_t k, int64_t at, const TileRows<L>& rows) {
    T* __restrict logits = logits_ + at * L;
    T* __restrict exps = exps_ + at * L;
    alignas(64) T largest[L], sum[L], weighted[L];
    max_of(logits, d_.nvec[k], largest);
    note_impossible(largest, rows);
    PYPPO_LANES(i) sum[i] = weighted[i] = T(0);
    for_runs(0, d_.nvec[k], [&](auto run, int64_t j) {
      PYPPO_LANES(i) {
        T s = sum[i], w = weighted[i];
        const T m = largest[i];
        for_columns(run, [&](int c) PYPPO_INLINE {
          const int64_t at = (j + c) * L + i;
          const T shifted = logits[at] - m;
          const T e = math::exp_nonpositive(shifted);
          logits[at] = shifted;
          exps[at] = e;
          s += e;
          w += math::categorical_weighted(e, shifted);
        });
        sum[i] = s;
        weighted[i] = w;
      }
    });
    T *log_sums = log_sum_ + k * L, *sums = sum_ + k * L, *inverse = inverse_ + k * L, *entropy = entropy_ + k * L;
    PYPPO_LANES(i) {
      sums[i] = sum[i];
      log_sums[i] = math::log_above_one(sum[i]);
      inverse[i] = T(1) / sum[i];
      entropy[i] = math::categorical_entropy(log_sums[i], weighted[i] * inverse[i]);
    }
  }

  void note_impossible(const T* largest, const TileRows<L>& rows) {
    const T minus_infinity = -T(__builtin_inff());
    uint32_t impossible = 0;
    PYPPO_LANES(i) impossible |= uint32_t(largest[i] == minus_infinity);
    if (impossible == 0) return;
    for (int i = 0; i < rows.count; ++i)
      if (largest[i] == minus_infinity) note_row(errors.distribution, rows.first + i);
  }

  static void max_of(const T* __restrict logits, int64_t count, T* __restrict largest) {
    PYPPO_LANES(i) largest[i] = logits[i];
    for_runs(1, count, [&](auto run, int64_t j) {
      const T* __restrict logit = logits + j * L;
      PYPPO_LANES(i) {
        T m = largest[i];
        for_columns(run, [&](int c) PYPPO_INLINE { m = math::max(m, logit[c * L + i]); });
        largest[i] = m;
      }
    });
  }

  // KL(old || new) of part k; leaves the old probabilities in old_.
  void old_terms(int64_t k, int64_t at, TileTerms<T, L>& out) const {
    const int64_t count = d_.nvec[k];
    alignas(64) T largest[L], sum[L], old_log_sum[L];
    max_of(old_ + at * L, count, largest);
    PYPPO_LANES(i) sum[i] = T(0);
    for (int64_t j = 0; j < count; ++j)
      PYPPO_LANES(i) sum[i] += math::exp_nonpositive(old_[(at + j) * L + i] - largest[i]);
    PYPPO_LANES(i) old_log_sum[i] = math::log_above_one(sum[i]);
    const T* log_sum = log_sum_ + k * L;
    for (int64_t j = 0; j < count; ++j) {
      T* __restrict old = old_ + (at + j) * L;
      const T* __restrict logit = logits_ + (at + j) * L;
      PYPPO_LANES(i) {
        const T old_logp = (old[i] - largest[i]) - old_log_sum[i];
        const T q = math::exp(old_logp);
        out.kl[i] += math::categorical_kl(q, old_logp, logit[i] - log_sum[i]);
        old[i] = q;
      }
    }
  }

  template <bool with_old>
  void backward_part(int64_t k, int64_t at, const TileGradients<T, L>& g) {
    const int32_t* __restrict action = actions_.get() + k * L;
    const T* __restrict log_sum = log_sum_ + k * L;
    const T* __restrict entropy = entropy_ + k * L;
    const T* __restrict inverse = inverse_ + k * L;
    for_runs(0, d_.nvec[k], [&](auto run, int64_t j) {
      T* __restrict logits = logits_ + (at + j) * L;
      const T* __restrict exps = exps_ + (at + j) * L;
      const T* __restrict old = with_old ? old_ + (at + j) * L : nullptr;
      PYPPO_LANES(i) {
        for_columns(run, [&](int c) PYPPO_INLINE {
          const T p = exps[c * L + i] * inverse[i], logp = logits[c * L + i] - log_sum[i];
          const bool chosen = action[i] == int32_t(j) + c;
          if constexpr (with_old)
            logits[c * L + i] = math::categorical_gradient(p, logp, chosen, entropy[i], old[c * L + i], g.logp[i],
                                                           g.entropy[i], g.kl[i]);
          else
            logits[c * L + i] = math::categorical_gradient(p, logp, chosen, entropy[i], g.logp[i], g.entropy[i]);
        });
      }
    });
  }

  void choose_mode(int64_t k, int64_t at) {
    int32_t* action = actions_.get() + k * L;
    alignas(64) T best[L];
    PYPPO_LANES(i) {
      best[i] = logits_[at * L + i];
      action[i] = 0;
    }
    for (int64_t j = 1; j < d_.nvec[k]; ++j) PYPPO_LANES(i) {
        const T logit = logits_[(at + j) * L + i];
        action[i] = logit > best[i] ? int32_t(j) : action[i];
        best[i] = logit > best[i] ? logit : best[i];
      }
  }

  // Inverse of the cumulative distribution, one uniform u a part: the first action whose cumulative sum passes u S.
  // S was summed in the same order; should u S round up to S, the last possible action stands in.
  void choose_drawn(int64_t k, int64_t at) {
    int32_t* action = actions_.get() + k * L;
    alignas(64) T threshold[L], cumulative[L];
    alignas(64) int32_t last[L];
    PYPPO_LANES(i) {
      threshold[i] = uniforms_[k * L + i] * sum_[k * L + i];
      cumulative[i] = T(0);
      last[i] = 0;
      action[i] = -1;
    }
    for (int64_t j = 0; j < d_.nvec[k]; ++j) PYPPO_LANES(i) {
        const T e = exps_[(at + j) * L + i];
        cumulative[i] += e;
        action[i] = action[i] < 0 && cumulative[i] > threshold[i] ? int32_t(j) : action[i];
        last[i] = e > T(0) ? int32_t(j) : last[i];
      }
    PYPPO_LANES(i) action[i] = action[i] < 0 ? last[i] : action[i];
  }

  const DistributionArgs& d_;
  const bool with_old_;
  Scratch<T> floats_;
  Scratch<int32_t> actions_;
  T *logits_, *exps_, *old_, *log_sum_, *sum_, *inverse_, *entropy_, *uniforms_;
};

}  // namespace
}  // namespace pyppo::cpu
