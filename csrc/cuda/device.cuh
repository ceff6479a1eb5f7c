// Groundwork of the CUDA kernels: dispatch over element types, checked launches, error rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace pyppo::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<float>) or f(Type<double>).
template <class F>
void dispatch(DType dtype, F&& f) {
  if (dtype == DType::f64)
    f(Type<double>{});
  else
    f(Type<float>{});
}

// Calls f(Type<arithmetic>, Type<network>): a network's half-precision outputs are computed with in float.
template <class F>
void dispatch(DType dtype, DType network_dtype, F&& f) {
  if (dtype == DType::f64)
    f(Type<double>{}, Type<double>{});
  else if (network_dtype == DType::f16)
    f(Type<float>{}, Type<__half>{});
  else if (network_dtype == DType::bf16)
    f(Type<float>{}, Type<__nv_bfloat16>{});
  else
    f(Type<float>{}, Type<float>{});
}

// The launch's own status: asking cudaGetLastError instead would also blame this kernel for an earlier one's failure.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave no error behind for the caller's other CUDA code
  throw std::runtime_error(std::string("the CUDA kernel ") + name + " did not launch: " + cudaGetErrorString(status));
}

inline void launch_zero(void* memory, size_t bytes, Stream stream) {
  const cudaError_t status = cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("the CUDA device's memory was not set: ") + cudaGetErrorString(status));
}

// A count on the device for a launch that is about to go to `stream`, 0 before it and, by `last_block`, after it: the
// stream's own, since its launches follow one another, or where the launch is captured, its own for good. Defined in
// device.cu.
unsigned* arrivals(Stream stream);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
__device__ inline T infinity() {
  return T(__builtin_inff());
}

// Keeps the first row: an unset -1 is the largest unsigned number.
__device__ inline void note_row(int64_t* error, int64_t row) {
  atomicMin(reinterpret_cast<unsigned long long*>(error), static_cast<unsigned long long>(row));
}

// The flags that a launch was given, see RowErrors.
struct ErrorFlags {
  int64_t* rows;  // nullable

  __device__ void action(int64_t row) const {
    if (rows != nullptr) note_row(rows, row);
  }
  __device__ void distribution(int64_t row) const {
    if (rows != nullptr) note_row(rows + 1, row);
  }
  __device__ void index(int64_t row) const {
    if (rows != nullptr) note_row(rows + 2, row);
  }
};

}  // namespace pyppo::cuda
