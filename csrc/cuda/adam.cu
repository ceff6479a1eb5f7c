// Adam on a GPU over one flat buffer, with global-norm clipping in the same call, in two launches: the squares of the
// gradient by blocks, beside which one more block computes the step's numbers; then the update, each of whose blocks
// adds the squares up for itself.
#include "../math/adam.h"

#include "reduce.cuh"

namespace pyppo::cuda {
namespace {

constexpr int threads = 256;
constexpr int max_partial = threads;  // blocks of the first launch: a thread of the second reads one sum
constexpr int64_t max_blocks = 1024;

// What the first launch tells the second.
template <class T>
struct NextStep {
  int64_t count;
  math::AdamStep<T> numbers;  // but for the clipping
};

template <class T>
struct AdamKernelArgs {
  int64_t size;
  T *params, *exp_avg, *exp_avg_sq;
  const T* grads;
  int64_t* step;
  const T* learning_rate_ptr;
  double learning_rate, beta1, beta2, eps, weight_decay, max_grad_norm;
  const uint8_t* skip;
  T* grad_norm;
  double* partial;  // [num_partial], sums of squares
  int num_partial;
  NextStep<T>* next;  // only the second launch may write `step`, which the first one reads
};

// As many elements as 16 bytes hold, or one where a buffer is not so aligned.
template <class T, int size>
struct alignas(sizeof(T) * size) Pack {
  T x[size];
};

template <class T, int size>
__device__ Pack<T, size> load(const T* from, int64_t i) {
  return reinterpret_cast<const Pack<T, size>*>(from)[i];
}

template <class T, int size>
__device__ void store(T* to, int64_t i, const Pack<T, size>& pack) {
  reinterpret_cast<Pack<T, size>*>(to)[i] = pack;
}

template <class T>
__device__ void prepare_step(const AdamKernelArgs<T>& a) {
  const double rate = a.learning_rate_ptr != nullptr ? double(*a.learning_rate_ptr) : a.learning_rate;
  const int64_t count = *a.step + 1;
  *a.next = {count, math::adam_step<T>(double(count), 1.0, rate, a.beta1, a.beta2, a.eps, a.weight_decay)};
}

template <class T, int size>
__global__ __launch_bounds__(threads) void squares_kernel(const __grid_constant__ AdamKernelArgs<T> a) {
  if (blockIdx.x == a.num_partial) {
    if (threadIdx.x == 0) prepare_step(a);
    return;
  }
  const int64_t packs = a.size / size, first = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int64_t stride = int64_t(a.num_partial) * threads;
  double sum[1] = {};
#pragma unroll 4
  for (int64_t i = first; i < packs; i += stride) {
    const Pack<T, size> g = load<T, size>(a.grads, i);
#pragma unroll
    for (int k = 0; k < size; ++k) sum[0] += double(g.x[k]) * double(g.x[k]);
  }
  const int64_t rest = packs * size + first;
  if (rest < a.size) sum[0] += double(a.grads[rest]) * double(a.grads[rest]);
  block_sum<threads>(sum);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum[0];
}

template <class T, int size>
__global__ __launch_bounds__(threads) void update_kernel(const __grid_constant__ AdamKernelArgs<T> a) {
  const int thread = threadIdx.x;
  const int64_t packs = a.size / size, first = int64_t(blockIdx.x) * threads + thread;
  const int64_t stride = int64_t(gridDim.x) * threads;
  const bool skipped = a.skip != nullptr && *a.skip != 0;
  double sum[1] = {thread < a.num_partial ? a.partial[thread] : 0.0};
  block_sum<threads>(sum);
  const double norm = sqrt(sum[0]);
  if (first == 0) {
    *a.grad_norm = T(norm);
    if (!skipped) *a.step = a.next->count;
  }
  if (skipped) return;
  math::AdamStep<T> step = a.next->numbers;
  step.clip = T(math::adam_clip(norm, a.max_grad_norm));
  for (int64_t i = first; i < packs; i += stride) {
    const Pack<T, size> g = load<T, size>(a.grads, i);
    Pack<T, size> p = load<T, size>(a.params, i), m = load<T, size>(a.exp_avg, i), v = load<T, size>(a.exp_avg_sq, i);
#pragma unroll
    for (int k = 0; k < size; ++k) math::adam_update(step, g.x[k], p.x[k], m.x[k], v.x[k]);
    store(a.params, i, p);
    store(a.exp_avg, i, m);
    store(a.exp_avg_sq, i, v);
  }
  const int64_t rest = packs * size + first;
  if (rest < a.size) math::adam_update(step, a.grads[rest], a.params[rest], a.exp_avg[rest], a.exp_avg_sq[rest]);
}

int num_partial(int64_t size) {
  constexpr int64_t elements = 8 * threads;  // of a block
  const int64_t blocks = ceil_div(size, elements);
  return int(blocks < 1 ? 1 : smaller<int64_t>(blocks, max_partial));
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, int size>
void launch_adam(const AdamKernelArgs<T>& a, Stream stream) {
  const int64_t blocks = ceil_div(a.size, int64_t(size) * threads);
  launch("adam (squares)", squares_kernel<T, size>, a.num_partial + 1, threads, 0, stream, a);
  launch("adam", update_kernel<T, size>, blocks < 1 ? 1 : smaller(blocks, max_blocks), threads, 0, stream, a);
}

template <class T>
void launch_adam(const AdamArgs& args, void* workspace, Stream stream) {
  AdamKernelArgs<T> a;
  a.size = args.size;
  a.params = static_cast<T*>(args.params);
  a.exp_avg = static_cast<T*>(args.exp_avg);
  a.exp_avg_sq = static_cast<T*>(args.exp_avg_sq);
  a.grads = static_cast<const T*>(args.grads);
  a.step = args.step;
  a.learning_rate_ptr = static_cast<const T*>(args.learning_rate_ptr);
  a.learning_rate = args.learning_rate;
  a.beta1 = args.beta1;
  a.beta2 = args.beta2;
  a.eps = args.eps;
  a.weight_decay = args.weight_decay;
  a.max_grad_norm = args.max_grad_norm;
  a.skip = args.skip;
  a.grad_norm = static_cast<T*>(args.grad_norm);
  a.num_partial = num_partial(args.size);
  a.next = static_cast<NextStep<T>*>(workspace);
  a.partial = reinterpret_cast<double*>(a.next + 1);
  if (is_aligned(a.params) && is_aligned(a.exp_avg) && is_aligned(a.exp_avg_sq) && is_aligned(a.grads))
    launch_adam<T, 16 / sizeof(T)>(a, stream);
  else
    launch_adam<T, 1>(a, stream);
}

}  // namespace

size_t adam_workspace(const AdamArgs& args) {
  static_assert(sizeof(NextStep<float>) % sizeof(double) == 0, "the partial sums lie behind it");
  const size_t next = args.dtype == DType::f64 ? sizeof(NextStep<double>) : sizeof(NextStep<float>);
  return next + size_t(num_partial(args.size)) * sizeof(double);
}

void adam(const AdamArgs& args, void* workspace, Stream stream) {
  dispatch(args.dtype, [&](auto type) { launch_adam<typename decltype(type)::type>(args, workspace, stream); });
}

}  // namespace pyppo::cuda
