// The fused PPO loss with its gradients over a block of rows.
#pragma once

#include "distribution_tile.h"
#include "loss_tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

template <class T, int L>
inline void add_log_std(const NormalTile<T, L>& tile, double* sums, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sums[j] = tile.log_std_sums()[j];
}

template <class Tile>
inline void add_log_std(const Tile&, double*, int64_t) {}

// One block of rows. `log_std` [width] receives the block's share of a shared log_std's gradient.
template <template <class, int> class Tile, class T, int L>
RowErrors loss_block(const PpoLossArgs& a, const BatchMoments& moments, int64_t first, int64_t end, double* sums,
                     double* log_std) {
  const bool with_old = a.old_logits != nullptr || a.old_mean != nullptr;
  Tile<T, L> tile(a.dist, with_old);
  tile.differentiate_kl = with_old && a.loss.objective == Objective::kl;
  LossTile<T, L> loss(a.loss, moments, with_old);
  for (int64_t row = first; row < end; row += L) {
    const LossRows<T, L> r = loss_rows<T, L>(a.loss, row, end);
    TileTerms<T, L> terms;
    TileGradients<T, L> gradients;
    tile.load(r.rows);
    tile.load_actions_of(a, r.rows);
    if (with_old) tile.load_old(a, r.rows);
    tile.terms(terms);
    loss.surrogate(r, terms, gradients);
    tile.backward(gradients);
    tile.store_gradients(a, r.rows);
  }
  loss.add_sums_to(sums);
  if (log_std != nullptr) add_log_std(tile, log_std, a.dist.width);
  return tile.errors;
}

}  // namespace
}  // namespace pyppo::cpu
