// Observations by running statistics, from the type they are stored in to float.
#include "../math/normalize.h"

#include "isa.h"
#include "memory.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t least_width = 64;  // of the loop over features: fewer are repeated for several rows
constexpr int64_t task_elements = 1 << 14;

template <class X>
void normalize_span(const X* __restrict x, const float* __restrict mean, const float* __restrict scale, float clip,
                    float* __restrict out, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = math::normalize(float(x[i]), mean[i], scale[i], clip);
}

template <class X>
void normalize_of(const NormalizeArgs& a) {
  const int64_t repeats = a.features >= least_width ? 1 : (least_width + a.features - 1) / a.features;
  const int64_t used = a.rows < repeats ? a.rows : repeats, width = used * a.features;
  const Scratch<float> mean{size_t(width)}, scale{size_t(width)};
  for (int64_t f = 0; f < a.features; ++f) {
    mean.get()[f] = float(a.mean[f]);
    scale.get()[f] = math::normalize_scale(a.var[f], a.eps);
  }
  for (int64_t i = a.features; i < width; ++i) {
    mean.get()[i] = mean.get()[i - a.features];
    scale.get()[i] = scale.get()[i - a.features];
  }
  const X* x = static_cast<const X*>(a.x);
  const int64_t size = a.rows * a.features;
  const int64_t spans = task_elements / width > 0 ? task_elements / width : 1, task = spans * width;
  parallel_for((size + task - 1) / task, double(size) * 5e-4, [&](int64_t t) {
    const int64_t end = (t + 1) * task < size ? (t + 1) * task : size;
    for (int64_t at = t * task; at < end; at += width)
      normalize_span(x + at, mean.get(), scale.get(), a.clip, a.out + at, at + width < end ? width : end - at);
  });
}

}  // namespace

void normalize(const NormalizeArgs& a) {
  if (a.rows == 0 || a.features == 0) return;
  switch (a.type) {
    case NumberType::i8:
      return normalize_of<int8_t>(a);
    case NumberType::u8:
      return normalize_of<uint8_t>(a);
    case NumberType::i16:
      return normalize_of<int16_t>(a);
    case NumberType::i32:
      return normalize_of<int32_t>(a);
    case NumberType::i64:
      return normalize_of<int64_t>(a);
    case NumberType::f32:
      return normalize_of<float>(a);
    case NumberType::f64:
      return normalize_of<double>(a);
  }
}

}  // namespace pyppo::cpu::PYPPO_ISA
