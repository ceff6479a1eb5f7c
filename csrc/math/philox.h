// Counted random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), and a
// counted permutation. Any number of the stream is computed from its position alone, so the batch order, the thread
// count and the device cannot change it.
#pragma once

#include "scalar.h"

namespace pyppo::math {

struct PhiloxBlock {
  uint32_t word[4];
};

PYPPO_FN PhiloxBlock philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The action noise of one row: block `block` of (row, that row's step).
PYPPO_FN PhiloxBlock action_noise(uint64_t seed, uint64_t row, uint64_t step, uint32_t block) {
  return philox(seed, uint32_t(row), uint32_t(step), uint32_t(step >> 32), block);
}

// Uniform numbers a block holds: four of 24 bits for float, two of 53 bits for double, each in [0, 1).
template <class T>
struct Uniforms;

template <>
struct Uniforms<float> {
  static constexpr int per_block = 4;
};

template <>
struct Uniforms<double> {
  static constexpr int per_block = 2;
};

PYPPO_FN float uniform_at(const PhiloxBlock& block, int i, float) {
  return float(int32_t(block.word[i] >> 8)) *
         5.9604644775390625e-08f;  // 2^-24; int32: vector units convert it directly
}

PYPPO_FN double uniform_at(const PhiloxBlock& block, int i, double) {
  const uint64_t bits = (uint64_t(block.word[2 * i]) << 21) ^ (uint64_t(block.word[2 * i + 1]) >> 11);
  return double(int64_t(bits)) * 1.1102230246251565e-16;  // 2^-53
}

// Box-Muller: two independent standard normals from two uniforms. 1 - u is in (0, 1], so the logarithm is finite.
template <class T>
PYPPO_FN void normal_pair(T u0, T u1, T& first, T& second) {
  const T radius = sqrt(T(-2) * math::log(T(1) - u0));
  T sine, cosine;
  sincos_turn(u1, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// A permutation of [0, n) that gives its i-th element alone: a balanced Feistel network over the next even power of
// two, keyed by Philox, walked until it falls inside (cycle walking; Black and Rogaway 2002). At most 4 n values are in
// the network's range, so a walk takes fewer than four rounds on average.
struct Permutation {
  static constexpr int rounds = 8;
  uint64_t n;
  int half_bits;
  uint32_t key[rounds];
};

PYPPO_FN Permutation make_permutation(uint64_t n, uint64_t seed, uint32_t iteration, uint32_t epoch) {
  Permutation p;
  p.n = n;
  p.half_bits = 1;
  while ((uint64_t(1) << (2 * p.half_bits)) < n) ++p.half_bits;
  for (uint32_t b = 0; b < 2; ++b) {
    // 0x5045524d ("PERM") keeps these keys out of the action noise's counters.
    const PhiloxBlock block = philox(seed ^ 0x5045524d00000000ull, iteration, epoch, 0x5045524du, b);
    for (int i = 0; i < 4; ++i) p.key[4 * b + i] = block.word[i];
  }
  return p;
}

PYPPO_FN uint32_t feistel_mix(uint32_t x, uint32_t key) {
  // Two multiply-xorshift steps; each input bit reaches every output bit.
  uint32_t h = (x ^ key) * 0x85ebca6bu;
  h ^= h >> 15;
  h = (h + key) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

PYPPO_FN uint64_t permute(const Permutation& p, uint64_t i) {
  const uint32_t mask = uint32_t((uint64_t(1) << p.half_bits) - 1);
  do {
    uint32_t left = uint32_t(i >> p.half_bits) & mask, right = uint32_t(i) & mask;
    for (int round = 0; round < Permutation::rounds; ++round) {
      const uint32_t next = left ^ (feistel_mix(right, p.key[round]) & mask);
      left = right;
      right = next;
    }
    i = (uint64_t(left) << p.half_bits) | right;
  } while (i >= p.n);
  return i;
}

}  // namespace pyppo::math
