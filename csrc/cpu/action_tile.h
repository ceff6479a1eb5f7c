// What the tiles of the three kinds of action distribution share: what they compute a lane, noise, and masked logits.
#pragma once

#include "../math/distributions.h"
#include "isa.h"
#include "memory.h"
#include "tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

template <class T, int L>
struct TileTerms {
  alignas(64) T logp[L], entropy[L], kl[L];

  TileTerms() { PYPPO_LANES(i) logp[i] = entropy[i] = kl[i] = T(0); }
};

template <class T, int L>
struct TileGradients {
  alignas(64) T logp[L], entropy[L], kl[L];
};

// Where the noise of a tile comes from.
template <int L>
struct TileNoise {
  uint64_t seed;
  uint64_t row;       // of the first lane
  uint64_t steps[L];  // each lane's own
};

// Fills uniforms [count][L] with the first `count` uniforms of each lane's row.
template <int L, class T>
inline void draw_uniforms(T* __restrict uniforms, const TileNoise<L>& noise, int64_t count) {
  constexpr int per_block = math::Uniforms<T>::per_block;
  for (int64_t first = 0; first < count; first += per_block) {
    PYPPO_LANES(i) {
      const math::PhiloxBlock block =
          math::action_noise(noise.seed, noise.row + uint64_t(i), noise.steps[i], uint32_t(first / per_block));
      for (int k = 0; k < per_block; ++k)
        if (first + k < count) uniforms[(first + k) * L + i] = math::uniform_at(block, k, T(0));
    }
  }
}

// Logits of a tile, those the mask forbids at -inf.
template <int L, class T>
inline void load_logits(T* tile, const DistributionArgs& d, const void* logits, const TileRows<L>& rows) {
  const int64_t offset = rows.first * d.width;
  load_tile<L>(tile, static_cast<const T*>(logits) + offset, rows.count, d.width);
  if (d.action_mask != nullptr) {
    const uint8_t* mask = d.action_mask + offset;
    for (int64_t j = 0; j < d.width; ++j)
      for (int i = 0; i < rows.count; ++i)
        tile[j * L + i] = mask[i * d.width + j] ? tile[j * L + i] : -T(__builtin_inff());
  }
  clear_dead(tile, rows, d.width);
}

inline bool mask_allows(const DistributionArgs& d, int64_t row, int64_t column) {
  return d.action_mask == nullptr || d.action_mask[row * d.width + column] != 0;
}

}  // namespace
}  // namespace pyppo::cpu
