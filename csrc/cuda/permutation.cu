// The counted permutation: each thread computes its own element.
#include "../math/philox.h"
#include "device.cuh"

namespace pyppo::cuda {
namespace {

constexpr int threads = 256;

__global__ __launch_bounds__(threads) void permutation_kernel(const __grid_constant__ math::Permutation permutation,
                                                              int64_t* __restrict__ out) {
  const uint64_t i = uint64_t(blockIdx.x) * threads + threadIdx.x;
  if (i < permutation.n) out[i] = int64_t(math::permute(permutation, i));
}

}  // namespace

void permutation(const PermutationArgs& args, Stream stream) {
  if (args.n <= 0) return;
  const math::Permutation permutation = math::make_permutation(uint64_t(args.n), args.seed, args.iteration, args.epoch);
  launch("permutation", permutation_kernel, ceil_div(args.n, threads), threads, 0, stream, permutation, args.out);
}

}  // namespace pyppo::cuda
