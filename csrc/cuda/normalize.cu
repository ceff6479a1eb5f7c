// Observations by running statistics, from the type they are stored in to float, in one launch. Lanes are a multiple of
// the features, so that each has one feature, whose scale it computes once.
#include "../math/normalize.h"
#include "device.cuh"

namespace pyppo::cuda {
namespace {

constexpr int threads = 256;
constexpr int64_t max_lanes = 1 << 17;
constexpr int64_t least_rows = 4;  // of a lane, while there are many

template <class X>
struct NormalizeKernelArgs {
  const X* x;
  const double *mean, *var;
  double eps;
  float clip;
  float* out;
  int64_t size, features, lanes;
};

template <class X>
__global__ __launch_bounds__(threads) void normalize_kernel(const __grid_constant__ NormalizeKernelArgs<X> a) {
  const int64_t lane = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (lane >= a.lanes) return;
  const int64_t feature = lane % a.features;
  const float mean = float(a.mean[feature]), scale = math::normalize_scale(a.var[feature], a.eps);
#pragma unroll 4
  for (int64_t i = lane; i < a.size; i += a.lanes) a.out[i] = math::normalize(float(a.x[i]), mean, scale, a.clip);
}

template <class X>
void launch_normalize(const NormalizeArgs& args, Stream stream) {
  const int64_t most = smaller(args.rows, max_lanes / args.features), few = ceil_div(args.rows, least_rows);
  const int64_t rows_at_once = most < 1 ? 1 : smaller(most, few);
  const NormalizeKernelArgs<X> a{static_cast<const X*>(args.x),
                                 args.mean,
                                 args.var,
                                 args.eps,
                                 args.clip,
                                 args.out,
                                 args.rows * args.features,
                                 args.features,
                                 rows_at_once * args.features};
  launch("normalize", normalize_kernel<X>, ceil_div(a.lanes, threads), threads, 0, stream, a);
}

}  // namespace

void normalize(const NormalizeArgs& args, Stream stream) {
  if (args.rows <= 0 || args.features <= 0) return;
  switch (args.type) {
    case NumberType::i8:
      return launch_normalize<int8_t>(args, stream);
    case NumberType::u8:
      return launch_normalize<uint8_t>(args, stream);
    case NumberType::i16:
      return launch_normalize<int16_t>(args, stream);
    case NumberType::i32:
      return launch_normalize<int32_t>(args, stream);
    case NumberType::i64:
      return launch_normalize<int64_t>(args, stream);
    case NumberType::f32:
      return launch_normalize<float>(args, stream);
    case NumberType::f64:
      return launch_normalize<double>(args, stream);
  }
}

}  // namespace pyppo::cuda
