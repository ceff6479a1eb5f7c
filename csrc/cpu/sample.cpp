// Draws actions on the CPU, with their log-probs and the distributions' entropies.
#include "pool.h"
#include "sample_block.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t rows_per_block = 1024;

template <template <class, int> class Tile, class T, int L>
RowErrors sample_of(const SampleArgs& a) {
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

// As in ppo_loss: the same lanes for a row whatever tile it falls in.
template <template <class, int> class Tile, class T>
RowErrors choose_lanes(const SampleArgs& a) {
  const bool small = a.batch <= 16 || a.dist.width > 512;
  return small ? sample_of<Tile, T, 16>(a) : sample_of<Tile, T, 64>(a);
}

template <class T>
RowErrors choose_kind(const SampleArgs& a) {
  switch (a.dist.kind) {
    case Distribution::bernoulli:
      return choose_lanes<BernoulliTile, T>(a);
    case Distribution::normal:
      return choose_lanes<NormalTile, T>(a);
    default:
      return choose_lanes<CategoricalTile, T>(a);
  }
}

}  // namespace

RowErrors sample(const SampleArgs& args) {
  return args.dtype == DType::f64 ? choose_kind<double>(args) : choose_kind<float>(args);
}

}  // namespace pyppo::cpu::PYPPO_ISA
