// Which devices there are, and which one is current.
#include "device.cuh"

namespace pyppo::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

int set_device(int device) {
  int previous = 0;
  check(cudaGetDevice(&previous), "cannot read the current CUDA device");
  if (previous != device) check(cudaSetDevice(device), "cannot change the current CUDA device");
  return previous;
}

Info info() {
  Info info = {};
  if (cudaRuntimeGetVersion(&info.runtime_version) != cudaSuccess) info.runtime_version = 0;
  if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) info.driver_version = 0;
  if (cudaGetDeviceCount(&info.device_count) != cudaSuccess) info.device_count = 0;
  cudaGetLastError();  // no driver or no device is an answer, not an error
  return info;
}

}  // namespace pyppo::cuda
