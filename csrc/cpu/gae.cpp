// Generalized advantage estimation on the CPU: columns (environments) are independent, time runs backward.
#include "../math/gae_step.h"
#include "../math/moments.h"

#include "isa.h"
#include "memory.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t strip = 1024;               // columns a task carries through time: carry and output rows stay in L1
constexpr int64_t narrow = 32;                // fewer columns than this: vectorise the TD errors over time as well
constexpr int64_t narrow_elements = 1 << 18;  // beyond, several threads are worth more than that
constexpr int64_t block_rows = 256;           // rows of TD errors that a narrow rollout computes ahead
constexpr int64_t moment_block = 4096;        // elements whose moments are merged with the others'
constexpr int64_t stream_bytes = 16 << 20;    // outputs beyond the caches are streamed past them

template <class T>
struct Arrays {
  const T *rewards, *values, *finals;
  const uint8_t *terminated, *truncated, *valid;
  T *advantages, *returns;
  int64_t num_steps, num_envs;
  T gamma, gamma_lambda;

  explicit Arrays(const GaeArgs& a)
      : rewards(static_cast<const T*>(a.rewards)),
        values(static_cast<const T*>(a.values)),
        // Without final values, those of the next row: the observation after a truncated step is the final one.
        finals(a.final_values ? static_cast<const T*>(a.final_values) : static_cast<const T*>(a.values) + a.num_envs),
        terminated(a.terminated),
        truncated(a.truncated),
        valid(a.valid),
        advantages(static_cast<T*>(a.advantages)),
        returns(static_cast<T*>(a.returns)),
        num_steps(a.num_steps),
        num_envs(a.num_envs),
        gamma(T(a.gamma)),
        gamma_lambda(T(a.gamma * a.gae_lambda)) {}
};

// One row of a strip. All or nothing is valid by template, so the common case loads no third flag.
template <bool has_valid, class T>
inline void step_row(const Arrays<T>& a, int64_t offset, int64_t count, T* __restrict next_value, T* __restrict trace,
                     T* __restrict advantages, T* __restrict returns) {
  const T *rewards = a.rewards + offset, *values = a.values + offset, *finals = a.finals + offset;
  const uint8_t *terminated = a.terminated + offset, *truncated = a.truncated + offset;
  const uint8_t* valid = has_valid ? a.valid + offset : nullptr;
  const T gamma = a.gamma, gamma_lambda = a.gamma_lambda;
#pragma GCC ivdep
  for (int64_t n = 0; n < count; ++n) {
    math::GaeCarry<T> carry{next_value[n], trace[n]};
    const bool live = has_valid ? valid[n] != 0 : true;
    const T value = values[n];
    const T advantage = math::gae_step(carry, rewards[n], value, finals[n], terminated[n] != 0, truncated[n] != 0, live,
                                       gamma, gamma_lambda);
    next_value[n] = carry.next_value;
    trace[n] = carry.trace;
    advantages[n] = advantage;
    returns[n] = live ? advantage + value : T(0);
  }
}

template <bool has_valid, class T>
void wide_strip(const Arrays<T>& a, int64_t first, int64_t count, bool stream) {
  alignas(64) T next_value[strip], trace[strip], advantages[strip], returns[strip];
  memcpy(next_value, a.values + a.num_steps * a.num_envs + first, size_t(count) * sizeof(T));
  memset(trace, 0, sizeof(trace));
  for (int64_t t = a.num_steps - 1; t >= 0; --t) {
    const int64_t offset = t * a.num_envs + first;
    if (!stream) {
      step_row<has_valid>(a, offset, count, next_value, trace, a.advantages + offset, a.returns + offset);
      continue;
    }
    step_row<has_valid>(a, offset, count, next_value, trace, advantages, returns);
    stream_copy(a.advantages + offset, advantages, size_t(count) * sizeof(T));
    stream_copy(a.returns + offset, returns, size_t(count) * sizeof(T));
  }
  if (stream) stream_fence();
}

// Few columns: the TD errors of a block need no recursion, but for the next valid row's value where some are not, and
// vectorise over its rows and columns alike; what remains is one multiply-add a row.
template <bool has_valid, class T>
void narrow_blocks(const Arrays<T>& a) {
  const int64_t width = a.num_envs;
  alignas(64) T delta[block_rows * narrow];
  alignas(64) uint8_t cut[block_rows * narrow];
  alignas(64) T trace[narrow] = {};
  alignas(64)
      T next[has_valid ? (block_rows + 1) * narrow : 1];  // each row's next valid value, the last row's after it
  if constexpr (has_valid) memcpy(next, a.values + a.num_steps * width, size_t(width) * sizeof(T));
  const T gamma = a.gamma, gamma_lambda = a.gamma_lambda;
  for (int64_t end = a.num_steps; end > 0;) {
    const int64_t begin = end > block_rows ? end - block_rows : 0;
    const int64_t offset = begin * width, size = (end - begin) * width;
    const T *rewards = a.rewards + offset, *values = a.values + offset, *finals = a.finals + offset;
    const uint8_t *terminated = a.terminated + offset, *truncated = a.truncated + offset;
    const uint8_t* valid = has_valid ? a.valid + offset : nullptr;
    const T* next_values = values + width;
    if constexpr (has_valid) {
      // The row before the block's first is the next block's last.
      for (int64_t n = 0; n < width; ++n) next[size + n] = next[n];
      for (int64_t i = size - 1; i >= 0; --i) next[i] = valid[i] != 0 ? values[i] : next[i + width];
      next_values = next + width;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
      delta[i] = math::gae_delta(rewards[i], values[i], next_values[i], finals[i], terminated[i] != 0,
                                 truncated[i] != 0, gamma);
      cut[i] = terminated[i] | truncated[i];
    }
    if (width == 1) {
      T carry = trace[0];
      for (int64_t i = size - 1; i >= 0; --i) {
        const T advantage = math::gae_advantage(delta[i], carry, cut[i] != 0, gamma_lambda);
        carry = has_valid && valid[i] == 0 ? carry : advantage;
        delta[i] = advantage;
      }
      trace[0] = carry;
    } else {
      for (int64_t i = size - width; i >= 0; i -= width) {
#pragma GCC ivdep
        for (int64_t n = 0; n < width; ++n) {
          const T advantage = math::gae_advantage(delta[i + n], trace[n], cut[i + n] != 0, gamma_lambda);
          trace[n] = has_valid && valid[i + n] == 0 ? trace[n] : advantage;
          delta[i + n] = advantage;
        }
      }
    }
    T *advantages = a.advantages + offset, *returns = a.returns + offset;
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
      const bool live = has_valid ? valid[i] != 0 : true;
      const T value = values[i];
      advantages[i] = live ? delta[i] : T(0);
      returns[i] = live ? delta[i] + value : T(0);
    }
    end = begin;
  }
}

template <class T>
void gae_of(const GaeArgs& args) {
  const Arrays<T> a(args);
  const int64_t elements = a.num_steps * a.num_envs;
  const bool small = elements <= narrow_elements || a.num_envs == 1;
  if (a.num_envs <= narrow && small) return a.valid != nullptr ? narrow_blocks<true>(a) : narrow_blocks<false>(a);
  const bool stream = elements * 2 * int64_t(sizeof(T)) > stream_bytes;
  // Columns are independent, so the split may follow the number of threads without changing a bit.
  const int64_t threads = get_num_threads();  // asked once: another Python thread may set it meanwhile
  int64_t width = (a.num_envs + threads - 1) / threads;
  if (width > 64) width = (width + 63) / 64 * 64;
  if (width > strip) width = strip;
  const int64_t strips = (a.num_envs + width - 1) / width;
  parallel_for(strips, double(elements) * 1e-3, [&](int64_t i) {
    const int64_t first = i * width;
    const int64_t count = first + width < a.num_envs ? width : a.num_envs - first;
    if (a.valid != nullptr)
      wide_strip<true>(a, first, count, stream);
    else
      wide_strip<false>(a, first, count, stream);
  });
}

// Of the numbers at valid rows; elsewhere x is 0. The sums have lanes, each of which adds in order.
template <class T>
math::Moments moments_of(const T* __restrict x, const uint8_t* __restrict valid, int64_t count) {
  constexpr int64_t lanes = 8;
  double counts[lanes] = {}, sums[lanes] = {}, squares[lanes] = {};
  const auto sweep = [&](auto&& take) {
    for (int64_t i = 0; i + lanes <= count; i += lanes)
      for (int64_t lane = 0; lane < lanes; ++lane) take(i + lane, lane);
    for (int64_t i = count / lanes * lanes; i < count; ++i) take(i, i % lanes);
  };
  const auto total = [](const double* x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); };
  sweep([&](int64_t i, int64_t lane) {
    counts[lane] += valid == nullptr || valid[i] != 0 ? 1.0 : 0.0;
    sums[lane] += double(x[i]);
  });
  const double n = total(counts), mean = n > 0 ? total(sums) / n : 0.0;
  sweep([&](int64_t i, int64_t lane) {
    const double deviation = valid == nullptr || valid[i] != 0 ? double(x[i]) - mean : 0.0;
    squares[lane] += deviation * deviation;
  });
  return {n, mean, total(squares)};
}

// Blocks of the shape alone, merged in order: the same bits on any number of threads.
template <class T>
void write_moments(const GaeArgs& args) {
  const int64_t elements = args.num_steps * args.num_envs, blocks = (elements + moment_block - 1) / moment_block;
  const Scratch<math::Moments> parts{size_t(2 * blocks)};
  parallel_for(2 * blocks, double(elements) * 2e-3, [&](int64_t i) {
    const int64_t first = i / 2 * moment_block,
                  count = elements - first < moment_block ? elements - first : moment_block;
    const T* x = static_cast<const T*>(i % 2 == 0 ? args.advantages : args.returns);
    parts.get()[i] = moments_of(x + first, args.valid == nullptr ? nullptr : args.valid + first, count);
  });
  math::Moments all[2] = {};
  for (int64_t i = 0; i < 2 * blocks; ++i) all[i % 2] = math::merge(all[i % 2], parts.get()[i]);
  for (int k = 0; k < 2; ++k) {
    args.moments[k * num_gae_moments + moment_count] = all[k].count;
    args.moments[k * num_gae_moments + moment_mean] = all[k].mean;
    args.moments[k * num_gae_moments + moment_squared_deviations] = all[k].squares;
  }
}

template <class T>
void gae_with_moments(const GaeArgs& args) {
  if (args.num_steps > 0 && args.num_envs > 0) gae_of<T>(args);
  if (args.moments != nullptr) write_moments<T>(args);
}

}  // namespace

void gae(const GaeArgs& args) {
  if (args.dtype == DType::f64)
    gae_with_moments<double>(args);
  else
    gae_with_moments<float>(args);
}

}  // namespace pyppo::cpu::PYPPO_ISA
