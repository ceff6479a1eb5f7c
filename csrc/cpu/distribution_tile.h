// The three kinds of action distribution over one tile of samples. Each loads the network's outputs, draws or loads
// actions, computes log-prob, entropy and KL a lane, and turns their gradients into the outputs' gradients.
#pragma once

#include "bernoulli_tile.h"
#include "categorical_tile.h"
#include "normal_tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

// Runs Kernel::run<Tile, T, L>(args) with the tile of a distribution's kind and dtype. Small batches take small tiles;
// so do wide distributions, whose tiles would leave the cache. A row's lanes are the same whatever tile it falls in.
template <class Kernel, class T, template <class, int> class Tile, class Args>
RowErrors run_on_lanes(const DistributionArgs& dist, int64_t batch, const Args& args) {
  const bool small = batch <= 16 || dist.width > 512;
  return small ? Kernel::template run<Tile, T, 16>(args) : Kernel::template run<Tile, T, 64>(args);
}

template <class Kernel, class T, class Args>
RowErrors run_on_kind(const DistributionArgs& dist, int64_t batch, const Args& args) {
  switch (dist.kind) {
    case Distribution::bernoulli:
      return run_on_lanes<Kernel, T, BernoulliTile>(dist, batch, args);
    case Distribution::normal:
      return run_on_lanes<Kernel, T, NormalTile>(dist, batch, args);
    default:
      return run_on_lanes<Kernel, T, CategoricalTile>(dist, batch, args);
  }
}

template <class Kernel, class Args>
RowErrors run_on_tiles(const DistributionArgs& dist, DType dtype, int64_t batch, const Args& args) {
  return dtype == DType::f64 ? run_on_kind<Kernel, double>(dist, batch, args)
                             : run_on_kind<Kernel, float>(dist, batch, args);
}

}  // namespace
}  // namespace pyppo::cpu
