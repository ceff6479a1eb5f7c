// What lies around a loss kernel: the moments of a large batch before it, the metrics after it.
#include "../loss_options.h"
#include "loss.cuh"

#include <cmath>
#include <limits>

namespace pyppo::cuda {
namespace {

constexpr int moment_threads = 256;
// What one block adds up soon enough to save a launch: a guess, not measured. It takes num_sums columns at a time.
constexpr int64_t last_block_sums = 8192, last_block_columns = 4 * num_sums;

// Each block takes one stretch of rows.
template <class T>
__global__ __launch_bounds__(moment_threads) void moments_kernel(const __grid_constant__ LossView<T> loss,
                                                                 BatchMoments* __restrict__ moments) {
  const int64_t rows = (loss.batch + gridDim.x - 1) / gridDim.x;
  const int64_t first = blockIdx.x * rows, end = smaller(first + rows, loss.batch);
  const BatchMoments found = stretch_moments<moment_threads>(loss, first, end);
  if (threadIdx.x == 0) moments[blockIdx.x] = found;
}

// Each block takes one group of columns.
template <class T>
__global__ __launch_bounds__(loss_threads) void finish_kernel(const __grid_constant__ LossView<T> loss,
                                                              const __grid_constant__ PartialSums partial) {
  finish_columns(loss, loss_scale(loss), partial, blockIdx.x);
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

PartialSums partial_sums(const LossPlan& plan, void* workspace, void* d_log_std, DType log_std_dtype, Stream stream) {
  PartialSums partial;
  partial.sums = reinterpret_cast<double*>(static_cast<BatchMoments*>(workspace) + plan.num_moments);
  partial.parts = plan.parts;
  partial.columns = plan.columns;
  partial.d_log_std = d_log_std;
  partial.log_std_dtype = log_std_dtype;
  const bool by_last_block =
      plan.parts > 0 && plan.columns <= last_block_columns && plan.parts * plan.columns <= last_block_sums;
  partial.arrivals = by_last_block ? arrivals(stream) : nullptr;
  return partial;
}

template <class T>
void launch_finish(const LossView<T>& loss, const PartialSums& partial, Stream stream) {
  if (partial.arrivals != nullptr) return;
  launch("loss (metrics)", finish_kernel<T>, ceil_div(partial.columns, num_sums), loss_threads, 0, stream, loss,
         partial);
}

template LossView<float> loss_view(const LossArgs&, const LossPlan&, void*);
template LossView<double> loss_view(const LossArgs&, const LossPlan&, void*);
template void launch_moments(const LossView<float>&, Stream);
template void launch_moments(const LossView<double>&, Stream);
template void launch_finish(const LossView<float>&, const PartialSums&, Stream);
template void launch_finish(const LossView<double>&, const PartialSums&, Stream);

}  // namespace pyppo::cuda
