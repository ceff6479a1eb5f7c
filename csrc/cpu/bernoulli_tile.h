// Actions of independent bits over one tile of samples.
#pragma once

#include "action_tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

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

}  // namespace
}  // namespace pyppo::cpu
