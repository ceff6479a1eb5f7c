// The counted permutation of [0, n).
#include "../math/philox.h"

#include "isa.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t block = 512;  // elements a task computes

}  // namespace

void permutation(const PermutationArgs& args) {
  if (args.n == 0) return;
  const math::Permutation p = math::make_permutation(uint64_t(args.n), args.seed, args.iteration, args.epoch);
  const int64_t blocks = (args.n + block - 1) / block;
  parallel_for(blocks, double(args.n) * 0.03, [&](int64_t b) {
    const int64_t end = (b + 1) * block < args.n ? (b + 1) * block : args.n;
    for (int64_t i = b * block; i < end; ++i) args.out[i] = int64_t(math::permute(p, uint64_t(i)));
  });
}

}  // namespace pyppo::cpu::PYPPO_ISA
