// Gaussian actions over one tile of samples.
#pragma once

#include "action_tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

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
