// Draws actions on the CPU, with their log-probs and the distributions' entropies.
#include "distribution_tile.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t rows_per_block = 1024;

template <template <class, int> class Tile, class T, int L>
RowErrors sample_block(const SampleArgs& a, int64_t first, int64_t end) {
  Tile<T, L> tile(a.dist, false);
  for (int64_t row = first; row < end; row += L) {
    const TileRows<L> rows = rows_from<L>(row, end);
    TileNoise<L> noise;
    noise.seed = a.seed;
    noise.row = uint64_t(a.row_offset + row);
    for (int i = 0; i < L; ++i)
      noise.steps[i] = uint64_t(a.steps != nullptr && i < rows.count ? a.steps[row + i] : a.step);
    TileTerms<T, L> terms;
    tile.load(rows);
    tile.draw(noise, a.deterministic, rows);
    tile.store_actions(a.actions, rows);
    tile.terms(terms);
    store_tile<L>(static_cast<T*>(a.logp) + row, terms.logp, rows.count, 1);
    store_tile<L>(static_cast<T*>(a.entropy) + row, terms.entropy, rows.count, 1);
  }
  return tile.errors;
}

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
