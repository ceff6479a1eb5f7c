// Linked instead of cuda/ where there is no nvcc: every launch throws.
#include <stdexcept>

#include "kernels.h"

namespace pyppo::cuda {
namespace {

[[noreturn]] void fail() {
  throw std::runtime_error(
      "pyppo was built without CUDA; tensors must be on the CPU. To use a GPU, rebuild it where nvcc is installed: "
      "PYPPO_CUDA=1 pip install --no-binary pyppo --force-reinstall pyppo");
}

}  // namespace

size_t gae_workspace(const GaeArgs&) { return 0; }
size_t ppo_loss_workspace(const PpoLossArgs&) { return 0; }
size_t surrogate_loss_workspace(const SurrogateLossArgs&) { return 0; }
size_t adam_workspace(const AdamArgs&) { return 0; }

void gae(const GaeArgs&, void*, Stream) { fail(); }
void ppo_loss(const PpoLossArgs&, void*, int64_t*, Stream) { fail(); }
void surrogate_loss(const SurrogateLossArgs&, void*, Stream) { fail(); }
void sample(const SampleArgs&, int64_t*, Stream) { fail(); }
void adam(const AdamArgs&, void*, Stream) { fail(); }
void permutation(const PermutationArgs&, Stream) { fail(); }
void gather_minibatch(const GatherArgs&, int64_t*, Stream) { fail(); }
void normalize(const NormalizeArgs&, Stream) { fail(); }

int set_device(int) { fail(); }
Info info() { return {}; }

}  // namespace pyppo::cuda
