// The launches around a loss kernel: the moments of a large batch before it, the metrics after it.
#include "../loss_options.h"
#include "loss.cuh"

#include <cmath>
#include <limits>

namespace pyppo::cuda {
namespace {

constexpr int moment_threads = 256;
constexpr int finish_warps = 32;

// Each block takes one stretch of rows.
template <class T>
__global__ __launch_bounds__(moment_threads) void moments_kernel(const __grid_constant__ LossView<T> loss,
                                                                 BatchMoments* __restrict__ moments) {
  const int64_t rows = (loss.batch + gridDim.x - 1) / gridDim.x;
  const int64_t first = blockIdx.x * rows, end = smaller(first + rows, loss.batch);
  const BatchMoments found = stretch_moments<moment_threads>(loss, first, end);
  if (threadIdx.x == 0) moments[blockIdx.x] = found;
}

__device__ void store_as(DType dtype, void* to, int64_t i, double x) {
  if (dtype == DType::f64)
    static_cast<double*>(to)[i] = x;
  else if (dtype == DType::f16)
    static_cast<__half*>(to)[i] = __half(float(x));
  else if (dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(to)[i] = __nv_bfloat16(float(x));
  else
    static_cast<float*>(to)[i] = float(x);
}

template <class T>
__device__ void store_stats(const LossView<T>& loss, const LossScale& scale, const double* sums) {
  for (int k = 0; k < num_sums; ++k) loss.stats[stat_policy + k] = T(sums[k] * scale.inverse_denominator);
  const double total = sums[0] + loss.vf_coef * sums[1] - loss.ent_coef * sums[2];
  loss.stats[stat_loss] = T(total * scale.inverse_denominator);
  loss.stats[stat_denominator] = T(scale.denominator);
}

// Sums the columns of partial [parts, columns], a lane a column: each warp takes every 32nd row, then warp 0 adds up.
template <class T>
__global__ __launch_bounds__(finish_warps* warp_size) void finish_kernel(const __grid_constant__ LossView<T> loss,
                                                                         const double* __restrict__ partial,
                                                                         int64_t parts, int64_t columns,
                                                                         void* d_log_std, DType log_std_dtype) {
  __shared__ double sums[finish_warps][warp_size];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int64_t column = int64_t(blockIdx.x) * warp_size + lane;
  double sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += finish_warps) sum += partial[part * columns + column];
  }
  sums[warp][lane] = sum;
  const LossScale scale = loss_scale<finish_warps * warp_size>(loss);
  __syncthreads();
  if (warp == 0) {
    for (int other = 1; other < finish_warps; ++other) sum += sums[other][lane];
    if (column >= num_sums && column < columns) store_as(log_std_dtype, d_log_std, column - num_sums, sum);
    sums[0][lane] = sum;
    __syncwarp();
    if (blockIdx.x == 0 && lane == 0) store_stats(loss, scale, sums[0]);
  }
}

}  // namespace

LossPlan loss_plan(const LossArgs& args, int64_t parts, int64_t shared_log_stds) {
  const bool sums_weights = std::isnan(args.denominator) && args.denominator_ptr == nullptr &&
                            (args.row_mask != nullptr || args.weights != nullptr);
  const int64_t blocks = smaller<int64_t>(moment_blocks, ceil_div(args.batch, moment_threads));
  LossPlan plan;
  const bool needed = sums_weights || args.normalize_advantages;
  plan.own_moments = needed && args.batch <= own_moments_rows;
  plan.num_moments = needed && !plan.own_moments ? int(blocks) : 0;
  plan.parts = parts;
  plan.columns = num_sums + shared_log_stds;
  return plan;
}

template <class T>
LossView<T> loss_view(const LossArgs& args, const LossPlan& plan, void* workspace) {
  LossView<T> view;
  view.batch = args.batch;
  view.old_logp = static_cast<const T*>(args.old_logp);
  view.advantages = static_cast<const T*>(args.advantages);
  view.old_values = static_cast<const T*>(args.old_values);
  view.returns = static_cast<const T*>(args.returns);
  view.row_mask = args.row_mask;
  view.weights = static_cast<const T*>(args.weights);
  view.denominator_ptr = static_cast<const T*>(args.denominator_ptr);
  view.denominator = args.denominator;
  view.options = surrogate_options<T>(args);
  view.normalize_advantages = args.normalize_advantages;
  view.ent_coef = args.ent_coef;
  view.vf_coef = args.values != nullptr ? args.vf_coef : 0.0;
  view.moments = static_cast<const BatchMoments*>(workspace);
  view.num_moments = plan.num_moments;
  view.own_moments = plan.own_moments;
  view.stats = static_cast<T*>(args.stats);
  return view;
}

template <class T>
void launch_moments(const LossView<T>& loss, Stream stream) {
  if (loss.num_moments == 0) return;
  launch("loss (moments)", moments_kernel<T>, loss.num_moments, moment_threads, 0, stream, loss,
         const_cast<BatchMoments*>(loss.moments));
}

template <class T>
void launch_finish(const LossView<T>& loss, const LossPlan& plan, void* workspace, void* d_log_std, DType log_std_dtype,
                   Stream stream) {
  launch("loss (metrics)", finish_kernel<T>, ceil_div(plan.columns, warp_size), finish_warps * warp_size, 0, stream,
         loss, plan.partial_sums(workspace), plan.parts, plan.columns, d_log_std, log_std_dtype);
}

template LossView<float> loss_view(const LossArgs&, const LossPlan&, void*);
template LossView<double> loss_view(const LossArgs&, const LossPlan&, void*);
template void launch_moments(const LossView<float>&, Stream);
template void launch_moments(const LossView<double>&, Stream);
template void launch_finish(const LossView<float>&, const LossPlan&, void*, void*, DType, Stream);
template void launch_finish(const LossView<double>&, const LossPlan&, void*, void*, DType, Stream);

}  // namespace pyppo::cuda
