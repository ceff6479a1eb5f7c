// Adam (Kingma and Ba 2015) with decoupled weight decay and global-norm clipping, over one flat buffer.
#include <math.h>
#include <stdlib.h>

#include "isa.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t block = 16384;  // parameters a task updates
constexpr int lanes = 64;         // partial sums of squares a block keeps

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
  double* partial = static_cast<double*>(allocate_scratch(size_t(blocks) * sizeof(double)));
  parallel_for(blocks, double(a.size) * 2e-4, [&](int64_t b) {
    const int64_t first = b * block;
    partial[b] = sum_of_squares(grads + first, first + block < a.size ? block : a.size - first);
  });
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b];
  free(partial);
  return sqrt(sum);
}

template <class T>
struct Step {
  T clip, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_sqrt_correction, eps;
};

template <class T>
void apply(const Step<T> s, T* __restrict params, const T* __restrict grads, T* __restrict exp_avg,
           T* __restrict exp_avg_sq, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const T g = grads[i] * s.clip;
    const T m = s.beta1 * exp_avg[i] + s.one_minus_beta1 * g;
    const T v = s.beta2 * exp_avg_sq[i] + s.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    const T denominator = (sizeof(T) == 4 ? T(sqrtf(float(v))) : T(sqrt(double(v)))) * s.inverse_sqrt_correction + s.eps;
    params[i] = params[i] * s.decay - s.step_size * (m / denominator);
  }
}

template <class T>
void adam_of(const AdamArgs& a) {
  const double norm = norm_of<T>(a);
  *static_cast<T*>(a.grad_norm) = T(norm);
  if (a.skip != nullptr && *a.skip != 0) return;
  const double t = double(++*a.step);
  const double rate = a.learning_rate_ptr ? double(*static_cast<const T*>(a.learning_rate_ptr)) : a.learning_rate;
  // As torch.nn.utils.clip_grad_norm_: a NaN norm makes every gradient NaN, it is not hidden.
  const double factor = isinf(a.max_grad_norm) ? 1.0 : a.max_grad_norm / (norm + 1e-6);
  Step<T> s;
  s.clip = T(factor > 1 ? 1.0 : factor);
  s.beta1 = T(a.beta1);
  s.one_minus_beta1 = T(1.0 - a.beta1);  // in double: 1 - float(0.999) is 5e-5 off
  s.beta2 = T(a.beta2);
  s.one_minus_beta2 = T(1.0 - a.beta2);
  s.decay = T(1.0 - rate * a.weight_decay);
  s.step_size = T(rate / (1.0 - pow(a.beta1, t)));
  s.inverse_sqrt_correction = T(1.0 / sqrt(1.0 - pow(a.beta2, t)));
  s.eps = T(a.eps);
  const int64_t blocks = (a.size + block - 1) / block;
  parallel_for(blocks, double(a.size) * 1e-3, [&](int64_t b) {
    const int64_t first = b * block;
    const int64_t count = first + block < a.size ? block : a.size - first;
    apply(s, static_cast<T*>(a.params) + first, static_cast<const T*>(a.grads) + first,
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
