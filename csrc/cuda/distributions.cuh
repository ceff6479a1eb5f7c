// The three kinds of action distribution over one row, worked on by one thread or by a warp. A row gives its log-prob,
// entropy and KL, and turns their gradients into the gradients of the network's outputs. The formulas are math's.
#pragma once

#include "../math/distributions.h"
#include "loss.cuh"
#include "tile.cuh"

namespace pyppo::cuda {

constexpr int max_parts = 256;  // they travel among a kernel's parameters

// Where each categorical of a row begins; offset[count] is the row's width.
struct Parts {
  int count;
  int offset[max_parts + 1];
};

inline Parts make_parts(const DistributionArgs& dist) {
  if (dist.num_parts > max_parts)
    throw std::invalid_argument("nvec has " + std::to_string(dist.num_parts) + " parts; on CUDA it must have at most " +
                                std::to_string(max_parts));
  Parts parts;
  parts.count = int(dist.num_parts);
  parts.offset[0] = 0;
  for (int k = 0; k < parts.count; ++k) parts.offset[k + 1] = parts.offset[k] + int(dist.nvec[k]);
  return parts;
}

// Logits of one row. What the mask forbids, if there is one, is -inf.
template <class T, class S>
struct LogitRow {
  const S* data;
  const uint8_t* mask;  // nullable

  __device__ T operator()(int j) const { return mask != nullptr && mask[j] == 0 ? -infinity<T>() : T(data[j]); }
};

// Integer actions of 1, 4 or 8 bytes.
__device__ inline int64_t load_action(const void* actions, int bytes, int64_t i) {
  return bytes == 8   ? static_cast<const int64_t*>(actions)[i]
         : bytes == 4 ? static_cast<const int32_t*>(actions)[i]
                      : static_cast<const uint8_t*>(actions)[i];
}

template <class T>
struct RowTerms {
  T logp, entropy, kl;
};

template <class T>
struct Softmax {
  T max, sum, log_sum, entropy;

  __device__ T logp(T logit) const { return (logit - max) - log_sum; }
};

template <class Team, class T, class Row>
__device__ T max_logit(const Row& logit, int begin, int end) {
  T largest = -infinity<T>();
  for (int j = begin + Team::lane(); j < end; j += Team::size) largest = math::max(largest, logit(j));
  return Team::max(largest);
}

template <class Team, class T, class Row>
__device__ Softmax<T> softmax(const Row& logit, int begin, int end) {
  const T largest = max_logit<Team, T>(logit, begin, end);
  T sum = T(0), weighted = T(0);
  for (int j = begin + Team::lane(); j < end; j += Team::size) {
    const T shifted = logit(j) - largest;
    const T e = math::exp(shifted);
    sum += e;
    weighted += math::categorical_weighted(e, shifted);
  }
  sum = Team::sum(sum);
  const T log_sum = math::log(sum);
  return {largest, sum, log_sum, math::categorical_entropy(log_sum, Team::sum(weighted) / sum)};
}

// One or more categoricals side by side. T: arithmetic; S: what the row is stored as, T in a tile.
template <class Team, class T, class S>
struct CategoricalRow {
  const Parts& parts;
  LogitRow<T, S> logits, old_logits;  // old_logits.data is nullable
  const uint8_t* allowed;             // the row of the mask, nullable
  const void* actions;
  int action_bytes;
  int64_t first_action;
  S* d_logits;          // may be where the logits are
  Softmax<T> now, old;  // of the part worked on last

  // Out of range: the first action, so that no read goes astray.
  __device__ int chosen(int k, const ErrorFlags& errors, int64_t row) const {
    const int64_t action = load_action(actions, action_bytes, first_action + k);
    const int begin = parts.offset[k];
    const bool inside = action >= 0 && action < parts.offset[k + 1] - begin;
    const int j = begin + (inside ? int(action) : 0);
    if (!inside || (allowed != nullptr && allowed[j] == 0)) errors.action(row);
    return j;
  }

  __device__ void load_part(int k) {
    const int begin = parts.offset[k], end = parts.offset[k + 1];
    now = softmax<Team, T>(logits, begin, end);
    if (old_logits.data != nullptr) old = softmax<Team, T>(old_logits, begin, end);
  }

  __device__ T part_kl(int k) const {
    T kl = T(0);
    for (int j = parts.offset[k] + Team::lane(); j < parts.offset[k + 1]; j += Team::size) {
      const T old_logp = old.logp(old_logits(j));
      kl += math::categorical_kl(math::exp(old_logp), old_logp, now.logp(logits(j)));
    }
    return Team::sum(kl);
  }

  __device__ RowTerms<T> terms(const ErrorFlags& errors, int64_t row) {
    RowTerms<T> out{T(0), T(0), T(0)};
    for (int k = 0; k < parts.count; ++k) {
      load_part(k);
      if (now.max == -infinity<T>()) errors.distribution(row);
      out.logp += now.logp(logits(chosen(k, errors, row)));
      out.entropy += now.entropy;
      if (old_logits.data != nullptr) out.kl += part_kl(k);
    }
    return out;
  }

  __device__ void backward(const SampleGradient<T>& g) {
    for (int k = 0; k < parts.count; ++k) {
      if (parts.count > 1) load_part(k);
      const int action = chosen(k, {nullptr}, 0);
      for (int j = parts.offset[k] + Team::lane(); j < parts.offset[k + 1]; j += Team::size) {
        const T logp = now.logp(logits(j));
        const T q = old_logits.data != nullptr ? math::exp(old.logp(old_logits(j))) : T(0);
        d_logits[j] =
            S(math::categorical_gradient(math::exp(logp), logp, j == action, now.entropy, q, g.logp, g.entropy, g.kl));
      }
    }
  }

  __device__ void clear() {
    for (int j = Team::lane(); j < parts.offset[parts.count]; j += Team::size) d_logits[j] = S(0.0f);
  }
};

// A bit as a number: 0, 1, or 2 for what is no bit, or a 1 that the mask forbids.
__device__ inline int bit_code(const void* actions, int bytes, int64_t i, const uint8_t* mask) {
  const int64_t action = load_action(actions, bytes, i);
  if (action == 0) return 0;
  return action == 1 && (mask == nullptr || mask[i] != 0) ? 1 : 2;
}

// The bits of a row where the caller has them, and in a tile.
struct StoredBits {
  const void* actions;
  int bytes;
  int64_t first;
  const uint8_t* mask;  // of the whole batch, nullable

  __device__ int operator()(int j) const { return bit_code(actions, bytes, first + j, mask); }
};

template <class T>
struct StagedBits {
  const T* codes;

  __device__ int operator()(int j) const { return int(codes[j]); }
};

// Independent bits. A masked bit is surely 0: its logit is -inf.
template <class Team, class T, class S, class Bits>
struct BernoulliRow {
  int width;
  LogitRow<T, S> logits, old_logits;  // old_logits.data is nullable
  Bits bits;
  S* d_logits;  // may be where the logits are

  __device__ RowTerms<T> terms(const ErrorFlags& errors, int64_t row) const {
    RowTerms<T> out{T(0), T(0), T(0)};
    for (int j = Team::lane(); j < width; j += Team::size) {
      const T logit = logits(j);
      const int code = bits(j);
      if (code == 2) errors.action(row);
      out.logp += math::bernoulli_logp(logit, code != 0);
      out.entropy += math::bernoulli_entropy(logit);
      if (old_logits.data != nullptr) out.kl += math::bernoulli_kl(old_logits(j), logit);
    }
    return {Team::sum(out.logp), Team::sum(out.entropy), Team::sum(out.kl)};
  }

  __device__ void backward(const SampleGradient<T>& g) const {
    for (int j = Team::lane(); j < width; j += Team::size) {
      const T q = old_logits.data != nullptr ? math::sigmoid(old_logits(j)) : T(0);
      d_logits[j] = S(math::bernoulli_gradient(logits(j), bits(j) != 0, q, g.logp, g.entropy, g.kl));
    }
  }

  __device__ void clear() const {
    for (int j = Team::lane(); j < width; j += Team::size) d_logits[j] = S(0.0f);
  }
};

// A diagonal Gaussian.
template <class Team, class T, class S>
struct NormalRow {
  int width;
  const S *mean, *log_std, *old_mean, *old_log_std;  // old_mean is nullable
  const T* actions;
  S *d_mean, *d_log_std;  // may be where the means are, and the actions or log_stds
  double* log_std_sums;   // where given, the gradient of log_std is added here instead

  __device__ RowTerms<T> terms(const ErrorFlags&, int64_t) const {
    RowTerms<T> out{T(0), T(0), T(0)};
    for (int j = Team::lane(); j < width; j += Team::size) {
      const T m = T(mean[j]), s = T(log_std[j]);
      const T z = (actions[j] - m) * math::exp(-s);
      out.logp += math::normal_logp(z, s);
      out.entropy += math::normal_entropy(s);
      if (old_mean != nullptr) out.kl += math::normal_kl(m, s, T(old_mean[j]), T(old_log_std[j]));
    }
    return {Team::sum(out.logp), Team::sum(out.entropy), Team::sum(out.kl)};
  }

  __device__ void backward(const SampleGradient<T>& g) const {
    for (int j = Team::lane(); j < width; j += Team::size) {
      const T m = T(mean[j]), s = T(log_std[j]), inverse_std = math::exp(-s);
      const T z = (actions[j] - m) * inverse_std;
      math::NormalGradient<T> d = math::normal_gradient(z, inverse_std, g.logp, g.entropy);
      if (old_mean != nullptr && g.kl != T(0)) {
        const math::NormalGradient<T> k = math::normal_kl_gradient(m, s, T(old_mean[j]), T(old_log_std[j]), g.kl);
        d.mean += k.mean;
        d.log_std += k.log_std;
      }
      d_mean[j] = S(d.mean);
      if (log_std_sums != nullptr)
        log_std_sums[j] += double(d.log_std);
      else
        d_log_std[j] = S(d.log_std);
    }
  }

  __device__ void clear() const {
    for (int j = Team::lane(); j < width; j += Team::size) {
      d_mean[j] = S(0.0f);
      if (log_std_sums == nullptr) d_log_std[j] = S(0.0f);
    }
  }
};

}  // namespace pyppo::cuda
