// Draws actions on the CPU, with their log-probs and the distributions' entropies.
#include "pool.h"
#include "sample_block.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t rows_per_block = 1024;

struct Sample {
  template <template <class, int> class Tile, class T, int L>
  static RowErrors run(const SampleArgs& a) {
    const int64_t blocks = (a.batch + rows_per_block - 1) / rows_per_block;
    Scratch<RowErrors> errors(static_cast<size_t>(blocks));
    const double microseconds = double(a.batch) * (20.0 + 3.0 * double(a.dist.width)) * 1e-3;
    parallel_for(blocks, microseconds, [&](int64_t b) {
      const int64_t first = b * rows_per_block;
      const int64_t end = first + rows_per_block < a.batch ? first + rows_per_block : a.batch;
      errors.get()[b] = sample_block<Tile, T, L>(a, first, end);
    });
    for (int64_t b = 0; b < blocks; ++b)
      if (errors.get()[b].distribution >= 0) return errors.get()[b];
    return {};
  }
};

}  // namespace

RowErrors sample(const SampleArgs& args) { return run_on_tiles<Sample>(args.dist, args.dtype, args.batch, args); }

}  // namespace pyppo::cpu::PYPPO_ISA
