// Adam (Kingma and Ba 2015) with decoupled weight decay and global-norm clipping, over one flat buffer.
#include <math.h>

#include "../math/adam.h"

#include "isa.h"
#include "memory.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t block = 2048;  // parameters a task updates
constexpr int lanes = 64;        // partial sums of squares a block keeps

template <class T>
double sum_of_squares(const T* g, int64_t count) {
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
#pragma GCC ivdep
    for (int l = 0; l < lanes; ++l) sums[l] += double(g[i + l]) * double(g[i + l]);
  for (int l = 0; i < count; ++i, ++l) sums[l] += double(g[i]) * double(g[i]);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
  return sums[0];
}

// A fixed split into blocks, added in order: the same bits for any number of threads.
template <class T>
double norm_of(const AdamArgs& a) {
  const T* grads = static_cast<const T*>(a.grads);
  const int64_t blocks = (a.size + block - 1) / block;
  if (blocks <= 1) return sqrt(sum_of_squares(grads, a.size));
  const Scratch<double> partial(static_cast<size_t>(blocks));
  parallel_for(blocks, double(a.size) * 2e-4, [&](int64_t b) {
    const int64_t first = b * block;
    partial.get()[b] = sum_of_squares(grads + first, first + block < a.size ? block : a.size - first);
  });
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial.get()[b];
  return sqrt(sum);
}

template <class T>
void apply(const math::AdamStep<T> step, T* __restrict params, const T* __restrict grads, T* __restrict exp_avg,
           T* __restrict exp_avg_sq, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) math::adam_update(step, grads[i], params[i], exp_avg[i], exp_avg_sq[i]);
}

template <class T>
void adam_of(const AdamArgs& a) {
  const double norm = norm_of<T>(a);
  *static_cast<T*>(a.grad_norm) = T(norm);
  if (a.skip != nullptr && *a.skip != 0) return;
  const double t = double(++*a.step);
  const double rate = a.learning_rate_ptr ? double(*static_cast<const T*>(a.learning_rate_ptr)) : a.learning_rate;
  const double clip = math::adam_clip(norm, a.max_grad_norm);
  const auto step = math::adam_step<T>(t, clip, rate, a.beta1, a.beta2, a.eps, a.weight_decay);
  const int64_t blocks = (a.size + block - 1) / block;
  parallel_for(blocks, double(a.size) * 1e-3, [&](int64_t b) {
    const int64_t first = b * block;
    const int64_t count = first + block < a.size ? block : a.size - first;
    apply(step, static_cast<T*>(a.params) + first, static_cast<const T*>(a.grads) + first,
          static_cast<T*>(a.exp_avg) + first, static_cast<T*>(a.exp_avg_sq) + first, count);
  });
}

}  // namespace

void adam(const AdamArgs& args) {
  if (args.dtype == DType::f64)
    adam_of<double>(args);
  else
    adam_of<float>(args);
}

}  // namespace pyppo::cpu::PYPPO_ISA
