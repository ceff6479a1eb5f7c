// Draws the actions of a block of rows.
#pragma once

#include "distribution_tile.h"
#include "isa.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

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

}  // namespace
}  // namespace pyppo::cpu
