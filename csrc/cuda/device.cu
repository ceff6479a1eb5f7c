// Which devices there are, which one is current, and the counts that their launches leave at 0.
#include <map>
#include <mutex>
#include <utility>

#include "device.cuh"

namespace pyppo::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Counts of one device, all 0 at first.
class Counts {
 public:
  unsigned* take() {
    if (left_ == 0) {
      next_ = zeroed();
      left_ = counts_at_once;
    }
    --left_;
    return next_++;
  }

 private:
  static constexpr int counts_at_once = 16384;

  // Kept for good. It may be asked for while a stream is captured, which allows no such calls but in relaxed mode.
  static unsigned* zeroed() {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cannot change the capture mode");
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t status = cudaMalloc(&memory, counts_at_once * sizeof(unsigned));
    if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = cudaMemsetAsync(memory, 0, counts_at_once * sizeof(unsigned), stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    if (stream != nullptr) cudaStreamDestroy(stream);
    if (status != cudaSuccess) cudaFree(memory);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(status, "cannot allocate 64 KiB on the CUDA device (torch.cuda.empty_cache() may help)");
    return static_cast<unsigned*>(memory);
  }

  unsigned* next_ = nullptr;
  int left_ = 0;
};

}  // namespace

unsigned* arrivals(Stream stream_) {
  static std::mutex mutex;
  static std::map<int, Counts> counts;                                     // of each device
  static std::map<std::pair<int, unsigned long long>, unsigned*> streams;  // device, stream
  const auto stream = static_cast<cudaStream_t>(stream_);
  int device = 0;
  unsigned long long id = 0;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaGetDevice(&device), "cannot read the current CUDA device");
  check(cudaStreamIsCapturing(stream, &capture), "cannot ask a CUDA stream whether it is captured");
  const std::lock_guard<std::mutex> lock(mutex);
  if (capture != cudaStreamCaptureStatusNone) return counts[device].take();
  check(cudaStreamGetId(stream, &id), "cannot tell CUDA streams apart");  // unlike handles, never used again
  unsigned*& own = streams[{device, id}];
  if (own == nullptr) own = counts[device].take();
  return own;
}

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
