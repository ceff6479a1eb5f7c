// The PPO loss on a GPU from given log-probs, with its gradients: a thread a sample.
#include "loss.cuh"

namespace pyppo::cuda {
namespace {

constexpr int64_t max_blocks = 1024;

template <class T, class N>
struct SurrogateKernelArgs {
  LossView<T> loss;
  const N *logp, *entropy, *kl, *values;
  N *d_logp, *d_entropy, *d_kl, *d_values;
  PartialSums partial;  // a part a block
};

template <class T, class N>
__device__ T load_or_zero(const N* from, int64_t i) {
  return from != nullptr ? T(from[i]) : T(0);
}

template <class T, class N>
__device__ void store_if(N* to, int64_t i, T x) {
  if (to != nullptr) to[i] = N(x);
}

template <class T, class N>
__global__ __launch_bounds__(loss_threads) void surrogate_kernel(const __grid_constant__ SurrogateKernelArgs<T, N> a) {
  const LossScale scale = loss_scale(a.loss);
  double sums[num_sums] = {};
  for (int64_t row = int64_t(blockIdx.x) * loss_threads + threadIdx.x; row < a.loss.batch;
       row += int64_t(gridDim.x) * loss_threads) {
    const T weight = row_weight(a.loss, row);
    SampleGradient<T> g{T(0), T(0), T(0)};
    T d_value = T(0);
    if (weight != T(0))
      g = sample_loss(a.loss, scale, row, weight, T(a.logp[row]), load_or_zero<T>(a.entropy, row),
                      load_or_zero<T>(a.kl, row), load_or_zero<T>(a.values, row), sums, d_value);
    store_if(a.d_logp, row, g.logp);
    store_if(a.d_entropy, row, g.entropy);
    store_if(a.d_kl, row, g.kl);
    store_if(a.d_values, row, d_value);
  }
  block_sum<loss_threads>(sums);
  if (threadIdx.x == 0) store_sums(a.partial.sums + int64_t(blockIdx.x) * num_sums, sums);
  finish_loss(a.loss, scale, a.partial);
}

LossPlan plan(const SurrogateLossArgs& args) {
  return loss_plan(args.loss, smaller(max_blocks, ceil_div(args.loss.batch, loss_threads)), 0);
}

template <class T, class N>
void launch_surrogate(const SurrogateLossArgs& args, void* workspace, Stream stream) {
  const LossPlan p = plan(args);
  SurrogateKernelArgs<T, N> a;
  a.loss = loss_view<T>(args.loss, p, workspace);
  a.logp = static_cast<const N*>(args.logp);
  a.entropy = static_cast<const N*>(args.entropy);
  a.kl = static_cast<const N*>(args.kl);
  a.values = static_cast<const N*>(args.loss.values);
  a.d_logp = static_cast<N*>(args.d_logp);
  a.d_entropy = static_cast<N*>(args.d_entropy);
  a.d_kl = static_cast<N*>(args.d_kl);
  a.d_values = static_cast<N*>(args.loss.d_values);
  a.partial = partial_sums(p, workspace, nullptr, args.loss.dtype, stream);
  launch_moments(a.loss, stream);
  if (p.parts > 0) launch("surrogate_loss", surrogate_kernel<T, N>, p.parts, loss_threads, 0, stream, a);
  launch_finish(a.loss, a.partial, stream);
}

}  // namespace

size_t surrogate_loss_workspace(const SurrogateLossArgs& args) { return plan(args).bytes(); }

void surrogate_loss(const SurrogateLossArgs& args, void* workspace, Stream stream) {
  dispatch(args.loss.dtype, args.loss.network_dtype, [&](auto type, auto network_type) {
    launch_surrogate<typename decltype(type)::type, typename decltype(network_type)::type>(args, workspace, stream);
  });
}

}  // namespace pyppo::cuda
