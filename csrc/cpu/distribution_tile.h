// The three kinds of action distribution over one tile of samples. Each loads the network's outputs, draws or loads
// actions, computes log-prob, entropy and KL a lane, and turns their gradients into the outputs' gradients.
#pragma once

#include "../math/distributions.h"
#include "../math/surrogate.h"
#include "isa.h"
#include "memory.h"
#include "tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

template <class T, int L>
struct TileTerms {
  alignas(64) T logp[L], entropy[L], kl[L];

  TileTerms() { PYPPO_LANES(i) logp[i] = entropy[i] = kl[i] = T(0); }
};

template <class T, int L>
struct TileGradients {
  alignas(64) T logp[L], entropy[L], kl[L];
};

// Where the noise of a tile comes from.
template <int L>
struct TileNoise {
  uint64_t seed;
  uint64_t row;       // of the first lane
  uint64_t steps[L];  // each lane's own
};

// Fills uniforms [count][L] with the first `count` uniforms of each lane's row.
template <int L, class T>
inline void draw_uniforms(T* __restrict uniforms, const TileNoise<L>& noise, int64_t count) {
  constexpr int per_block = math::Uniforms<T>::per_block;
  for (int64_t first = 0; first < count; first += per_block) {
    PYPPO_LANES(i) {
      const math::PhiloxBlock block =
          math::action_noise(noise.seed, noise.row + uint64_t(i), noise.steps[i], uint32_t(first / per_block));
      for (int k = 0; k < per_block; ++k)
        if (first + k < count) uniforms[(first + k) * L + i] = math::uniform_at(block, k, T(0));
    }
  }
}

// Logits of a tile, those the mask forbids at -inf.
template <int L, class T>
inline void load_logits(T* tile, const DistributionArgs& d, const void* logits, const TileRows<L>& rows) {
  const int64_t offset = rows.first * d.width;
  load_tile<L>(tile, static_cast<const T*>(logits) + offset, rows.count, d.width);
  if (d.action_mask != nullptr) {
    const uint8_t* mask = d.action_mask + offset;
    for (int64_t j = 0; j < d.width; ++j)
      for (int i = 0; i < rows.count; ++i)
        tile[j * L + i] = mask[i * d.width + j] ? tile[j * L + i] : -T(__builtin_inff());
  }
  clear_dead(tile, rows, d.width);
}

inline bool mask_allows(const DistributionArgs& d, int64_t row, int64_t column) {
  return d.action_mask == nullptr || d.action_mask[row * d.width + column] != 0;
}

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

// Independent bits, each from its logit. A masked bit is surely 0: its logit is -inf.
template <class T, int L>
class BernoulliTile {
 public:
  BernoulliTile(const DistributionArgs& d, bool with_old)
      : d_(d), with_old_(with_old), floats_(size_t((with_old ? 2 : 1) * d.width) * L), bits_(size_t(d.width) * L) {
    logits_ = floats_.get();
    old_ = logits_ + d.width * L;
  }

  void load(const TileRows<L>& rows) { load_logits<L>(logits_, d_, d_.logits, rows); }

  void load_old(const PpoLossArgs& a, const TileRows<L>& rows) { load_logits<L>(old_, d_, a.old_logits, rows); }

  void load_actions_of(const PpoLossArgs& a, const TileRows<L>& rows) {
    load_actions<L>(bits_.get(), a.actions, a.action_bytes, rows, d_.width);
    for (int64_t j = 0; j < d_.width; ++j) {
      if (d_.action_mask == nullptr && !any_outside<L>(bits_.get() + j * L, 2)) continue;
      for (int i = 0; i < rows.count; ++i) {
        const int32_t bit = bits_.get()[j * L + i];
        const bool allowed = bit == 0 || (bit == 1 && mask_allows(d_, rows.first + i, j));
        if (!allowed && rows.live[i]) note_row(errors.action, rows.first + i);
      }
    }
  }

  void draw(const TileNoise<L>& noise, bool deterministic, const TileRows<L>& rows) {
    Scratch<T> uniforms(size_t(d_.width) * L);
    if (!deterministic) draw_uniforms<L>(uniforms.get(), noise, d_.width);
    for (int64_t j = 0; j < d_.width; ++j) {
      const T* logit = logits_ + j * L;
      const T* uniform = uniforms.get() + j * L;
      int32_t* bit = bits_.get() + j * L;
      for (int i = 0; i < rows.count; ++i)
        if (logit[i] != logit[i]) note_row(errors.distribution, rows.first + i);
      if (deterministic)
        PYPPO_LANES(i) bit[i] = logit[i] > T(0) ? 1 : 0;
      else
        PYPPO_LANES(i) bit[i] = uniform[i] < math::sigmoid(logit[i]) ? 1 : 0;
    }
  }

  void store_actions(void* out, const TileRows<L>& rows) const {
    store_tile<L>(static_cast<int64_t*>(out) + rows.first * d_.width, bits_.get(), rows.count, d_.width);
  }

  void terms(TileTerms<T, L>& out) const {
    for (int64_t j = 0; j < d_.width; ++j) {
      const T* logit = logits_ + j * L;
      const int32_t* bit = bits_.get() + j * L;
      PYPPO_LANES(i) {
        out.logp[i] += math::bernoulli_logp(logit[i], bit[i] != 0);
        out.entropy[i] += math::bernoulli_entropy(logit[i]);
      }
      if (!with_old_) continue;
      const T* old = old_ + j * L;
      PYPPO_LANES(i) out.kl[i] += math::bernoulli_kl(old[i], logit[i]);
    }
  }

  // Leaves the gradient where the logits were.
  void backward(const TileGradients<T, L>& g) {
    for (int64_t j = 0; j < d_.width; ++j) {
      T* __restrict logit = logits_ + j * L;
      const int32_t* __restrict bit = bits_.get() + j * L;
      alignas(64) T old_probability[L], g_kl[L];
      PYPPO_LANES(i) old_probability[i] = g_kl[i] = T(0);
      if (differentiate_kl) PYPPO_LANES(i) {
          old_probability[i] = math::sigmoid(old_[j * L + i]);
          g_kl[i] = g.kl[i];
        }
      PYPPO_LANES(i)
      logit[i] = math::bernoulli_gradient(logit[i], bit[i] != 0, old_probability[i], g.logp[i], g.entropy[i], g_kl[i]);
    }
  }

  void store_gradients(const PpoLossArgs& a, const TileRows<L>& rows) const {
    store_tile<L>(static_cast<T*>(a.d_logits) + rows.first * d_.width, logits_, rows.count, d_.width);
  }

  RowErrors errors;
  bool differentiate_kl = false;  // else the KL is only measured

 private:
  const DistributionArgs& d_;
  const bool with_old_;
  Scratch<T> floats_;
  Scratch<int32_t> bits_;
  T *logits_, *old_;
};

// A diagonal Gaussian, its log standard deviation shared by all samples or each sample's own.
template <class T, int L>
class NormalTile {
 public:
  NormalTile(const DistributionArgs& d, bool with_old)
      : d_(d), with_old_(with_old), floats_(size_t((with_old ? 8 : 6) * d.width) * L), log_std_sums_(size_t(d.width)) {
    const int64_t size = d.width * L;
    mean_ = floats_.get();
    log_std_ = mean_ + size;
    inverse_std_ = log_std_ + size;
    actions_ = inverse_std_ + size;
    d_mean_ = actions_ + size;
    d_log_std_ = d_mean_ + size;
    old_mean_ = d_log_std_ + size;
    old_log_std_ = old_mean_ + size;
    for (int64_t j = 0; j < d.width; ++j) log_std_sums_.get()[j] = 0;
    if (!d.per_sample_log_std) {
      broadcast(log_std_, d.log_std);
      invert_std();
    }
  }

  void load(const TileRows<L>& rows) {
    load_floats(mean_, d_.mean, rows);
    if (!d_.per_sample_log_std) return;
    load_floats(log_std_, d_.log_std, rows);
    invert_std();
  }

  void load_old(const PpoLossArgs& a, const TileRows<L>& rows) {
    load_floats(old_mean_, a.old_mean, rows);
    if (d_.per_sample_log_std)
      load_floats(old_log_std_, a.old_log_std, rows);
    else
      broadcast(old_log_std_, a.old_log_std);
  }

  void load_actions_of(const PpoLossArgs& a, const TileRows<L>& rows) { load_floats(actions_, a.actions, rows); }

  void draw(const TileNoise<L>& noise, bool deterministic, const TileRows<L>& rows) {
    for (int64_t j = 0; j < d_.width; ++j)
      for (int i = 0; i < rows.count; ++i) {
        if (!math::normal_is_finite(mean_[j * L + i], log_std_[j * L + i]))
          note_row(errors.distribution, rows.first + i);
      }
    if (deterministic) {
      memcpy(actions_, mean_, size_t(d_.width) * L * sizeof(T));
      return;
    }
    Scratch<T> uniforms(size_t(d_.width + 1) * L);
    draw_uniforms<L>(uniforms.get(), noise, d_.width + (d_.width & 1));
    for (int64_t j = 0; j < d_.width; j += 2) {
      const T* u = uniforms.get() + j * L;
      alignas(64) T first[L], second[L];
      PYPPO_LANES(i) math::normal_pair(u[i], u[L + i], first[i], second[i]);
      PYPPO_LANES(i) actions_[j * L + i] = mean_[j * L + i] + math::exp(log_std_[j * L + i]) * first[i];
      if (j + 1 == d_.width) break;
      const int64_t next = (j + 1) * L;
      PYPPO_LANES(i) actions_[next + i] = mean_[next + i] + math::exp(log_std_[next + i]) * second[i];
    }
  }

  void store_actions(void* out, const TileRows<L>& rows) const {
    store_tile<L>(static_cast<T*>(out) + rows.first * d_.width, actions_, rows.count, d_.width);
  }

  void terms(TileTerms<T, L>& out) const {
    for (int64_t j = 0; j < d_.width; ++j) {
      const int64_t at = j * L;
      PYPPO_LANES(i) {
        const T z = (actions_[at + i] - mean_[at + i]) * inverse_std_[at + i];
        out.logp[i] += math::normal_logp(z, log_std_[at + i]);
        out.entropy[i] += math::normal_entropy(log_std_[at + i]);
      }
      if (!with_old_) continue;
      PYPPO_LANES(i)
      out.kl[i] += math::normal_kl(mean_[at + i], log_std_[at + i], old_mean_[at + i], old_log_std_[at + i]);
    }
  }

  void backward(const TileGradients<T, L>& g) {
    for (int64_t j = 0; j < d_.width; ++j) {
      const int64_t at = j * L;
      PYPPO_LANES(i) {
        const T z = (actions_[at + i] - mean_[at + i]) * inverse_std_[at + i];
        const math::NormalGradient<T> d = math::normal_gradient(z, inverse_std_[at + i], g.logp[i], g.entropy[i]);
        d_mean_[at + i] = d.mean;
        d_log_std_[at + i] = d.log_std;
      }
      if (differentiate_kl) {
        PYPPO_LANES(i) {
          const math::NormalGradient<T> d = math::normal_kl_gradient(mean_[at + i], log_std_[at + i], old_mean_[at + i],
                                                                     old_log_std_[at + i], g.kl[i]);
          d_mean_[at + i] += d.mean;
          d_log_std_[at + i] += d.log_std;
        }
      }
      if (!d_.per_sample_log_std) log_std_sums_.get()[j] += sum_lanes<L>(d_log_std_ + at);
    }
  }

  void store_gradients(const PpoLossArgs& a, const TileRows<L>& rows) const {
    const int64_t offset = rows.first * d_.width;
    store_tile<L>(static_cast<T*>(a.d_mean) + offset, d_mean_, rows.count, d_.width);
    if (d_.per_sample_log_std) store_tile<L>(static_cast<T*>(a.d_log_std) + offset, d_log_std_, rows.count, d_.width);
  }

  // The shared log_std's gradient over all tiles so far, [width].
  const double* log_std_sums() const { return log_std_sums_.get(); }

  RowErrors errors;
  bool differentiate_kl = false;  // else the KL is only measured

 private:
  void load_floats(T* tile, const void* floats, const TileRows<L>& rows) {
    load_tile<L>(tile, static_cast<const T*>(floats) + rows.first * d_.width, rows.count, d_.width);
    clear_dead(tile, rows, d_.width);
  }

  void broadcast(T* tile, const void* floats) {
    for (int64_t j = 0; j < d_.width; ++j) PYPPO_LANES(i) tile[j * L + i] = static_cast<const T*>(floats)[j];
  }

  void invert_std() {
    for (int64_t j = 0; j < d_.width; ++j) PYPPO_LANES(i) inverse_std_[j * L + i] = math::exp(-log_std_[j * L + i]);
  }

  const DistributionArgs& d_;
  const bool with_old_;
  Scratch<T> floats_;
  Scratch<double> log_std_sums_;
  T *mean_, *log_std_, *inverse_std_, *actions_, *d_mean_, *d_log_std_, *old_mean_, *old_log_std_;
};

}  // namespace
}  // namespace pyppo::cpu
