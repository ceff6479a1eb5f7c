// Chooses the instruction set once, when the first kernel runs, and forwards every kernel to it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

#ifdef PYPPO_HAVE_avx512
PYPPO_KERNELS_OF(avx512)
#endif
#ifdef PYPPO_HAVE_avx2
PYPPO_KERNELS_OF(avx2)
#endif
#ifdef PYPPO_HAVE_portable
PYPPO_KERNELS_OF(portable)
#endif

namespace pyppo::cpu {
namespace {

struct Table {
  const char* name;
  bool (*supported)();
  void (*gae)(const GaeArgs&);
  RowErrors (*ppo_loss)(const PpoLossArgs&);
  void (*surrogate_loss)(const SurrogateLossArgs&);
  RowErrors (*sample)(const SampleArgs&);
  void (*adam)(const AdamArgs&);
  void (*permutation)(const PermutationArgs&);
  RowErrors (*gather_minibatch)(const GatherArgs&);
  void (*normalize)(const NormalizeArgs&);
  void (*mlp_value)(const MlpValueArgs&);
  RowErrors (*mlp_act)(const MlpActArgs&);
  RowErrors (*mlp_update)(const MlpUpdateArgs&);
  RowErrors (*mlp_kl)(const MlpUpdateArgs&);
};

#define PYPPO_TABLE(isa, supported)                                                                          \
  Table {                                                                                                    \
    #isa, supported, isa::gae, isa::ppo_loss, isa::surrogate_loss, isa::sample, isa::adam, isa::permutation, \
        isa::gather_minibatch, isa::normalize, isa::mlp_value, isa::mlp_act, isa::mlp_update, isa::mlp_kl    \
  }

const Table tables[] = {
#ifdef PYPPO_HAVE_avx512
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
    PYPPO_TABLE(avx512,
                [] {
                  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("fma");
                }),
#endif
#ifdef PYPPO_HAVE_avx2
    PYPPO_TABLE(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
#ifdef PYPPO_HAVE_portable
    PYPPO_TABLE(portable, [] { return true; }),
#endif
};

const Table& choose() {
  const char* wanted = std::getenv("PYPPO_CPU");
  const bool automatic = wanted == nullptr || *wanted == '\0';
  for (const Table& table : tables) {
    if (!automatic && std::string(wanted) != table.name) continue;
    if (table.supported()) return table;
    if (!automatic) throw std::runtime_error(std::string("PYPPO_CPU is ") + wanted + ", which this CPU lacks");
  }
  throw std::runtime_error(std::string("PYPPO_CPU is '") + wanted +
                           "'; it must be avx512, avx2 or portable, and part of this build");
}

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

}  // namespace

void gae(const GaeArgs& args) { table().gae(args); }
RowErrors ppo_loss(const PpoLossArgs& args) { return table().ppo_loss(args); }
void surrogate_loss(const SurrogateLossArgs& args) { table().surrogate_loss(args); }
RowErrors sample(const SampleArgs& args) { return table().sample(args); }
void adam(const AdamArgs& args) { table().adam(args); }
void permutation(const PermutationArgs& args) { table().permutation(args); }
RowErrors gather_minibatch(const GatherArgs& args) { return table().gather_minibatch(args); }
void normalize(const NormalizeArgs& args) { table().normalize(args); }
void mlp_value(const MlpValueArgs& args) { table().mlp_value(args); }
RowErrors mlp_act(const MlpActArgs& args) { return table().mlp_act(args); }
RowErrors mlp_update(const MlpUpdateArgs& args) { return table().mlp_update(args); }
RowErrors mlp_kl(const MlpUpdateArgs& args) { return table().mlp_kl(args); }
const char* capability() { return table().name; }

}  // namespace pyppo::cpu
