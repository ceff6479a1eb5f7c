// The counted permutation of [0, n).
#include "../math/philox.h"

#include "isa.h"

namespace pyppo::cpu::PYPPO_ISA {

void permutation(const PermutationArgs& args) {
  if (args.n == 0) return;
  const math::Permutation p = math::make_permutation(uint64_t(args.n), args.seed, args.iteration, args.epoch);
  for (int64_t i = 0; i < args.n; ++i) args.out[i] = int64_t(math::permute(p, uint64_t(i)));
}

}  // namespace pyppo::cpu::PYPPO_ISA
