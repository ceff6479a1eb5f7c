// Kernel files are compiled once per instruction set, each time in a namespace of its own (PYPPO_ISA: avx512, avx2 or
// portable). Nothing with external linkage may be shared between the copies: the linker keeps one copy of an inline
// function or template, and a machine without AVX-512 would run it. So: static functions, no standard containers.
#pragma once

#include "../kernels.h"

#define PYPPO_KERNELS_OF(isa)                         \
  namespace pyppo::cpu::isa {                         \
  void gae(const GaeArgs& args);                      \
  RowErrors ppo_loss(const PpoLossArgs& args);        \
  void surrogate_loss(const SurrogateLossArgs& args); \
  RowErrors sample(const SampleArgs& args);           \
  void adam(const AdamArgs& args);                    \
  void permutation(const PermutationArgs& args);      \
  RowErrors gather_minibatch(const GatherArgs& args); \
  void normalize(const NormalizeArgs& args);          \
  void mlp_value(const MlpValueArgs& args);           \
  RowErrors mlp_act(const MlpActArgs& args);          \
  RowErrors mlp_update(const MlpUpdateArgs& args);    \
  RowErrors mlp_kl(const MlpUpdateArgs& args);        \
  }

#ifdef PYPPO_ISA
#define PYPPO_EXPAND(isa) PYPPO_KERNELS_OF(isa)
PYPPO_EXPAND(PYPPO_ISA)
#undef PYPPO_EXPAND
#endif
