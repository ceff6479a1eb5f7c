// The PPO loss on the CPU from given log-probs, with its gradients.
#include "loss_tile.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t rows_per_block = 4096;

template <class T, int L>
inline void load_or_zero(T* tile, const void* floats, const TileRows<L>& rows) {
  for (int i = 0; i < L; ++i)
    tile[i] = floats != nullptr && rows.live[i] ? static_cast<const T*>(floats)[rows.first + i] : T(0);
}

template <class T, int L>
inline void store(void* floats, const T* tile, const TileRows<L>& rows) {
  if (floats != nullptr) store_tile<L>(static_cast<T*>(floats) + rows.first, tile, rows.count, 1);
}

template <class T, int L>
void loss_block(const SurrogateLossArgs& a, const BatchMoments& moments, int64_t first, int64_t end, double* sums) {
  LossTile<T, L> loss(a.loss, moments, a.kl != nullptr);
  for (int64_t row = first; row < end; row += L) {
    const LossRows<T, L> r = loss_rows<T, L>(a.loss, row, end);
    TileTerms<T, L> terms;
    TileGradients<T, L> gradients;
    load_or_zero(terms.logp, a.logp, r.rows);
    load_or_zero(terms.entropy, a.entropy, r.rows);
    load_or_zero(terms.kl, a.kl, r.rows);
    loss.surrogate(r, terms, gradients);
    store(a.d_logp, gradients.logp, r.rows);
    store(a.d_entropy, gradients.entropy, r.rows);
    store(a.d_kl, gradients.kl, r.rows);
  }
  loss.add_sums_to(sums);
}

template <class T>
void loss_of(const SurrogateLossArgs& a) {
  const int64_t batch = a.loss.batch, blocks = (batch + rows_per_block - 1) / rows_per_block;
  const BatchMoments moments = batch_moments<T>(a.loss);
  Scratch<double> sums(size_t(blocks * num_sums));
  for (int64_t i = 0; i < blocks * num_sums; ++i) sums.get()[i] = 0;
  parallel_for(blocks, double(batch) * sizeof(T) * 1e-3, [&](int64_t b) {
    const int64_t first = b * rows_per_block, end = first + rows_per_block < batch ? first + rows_per_block : batch;
    if (batch <= 16)
      loss_block<T, 16>(a, moments, first, end, sums.get() + b * num_sums);
    else
      loss_block<T, 64>(a, moments, first, end, sums.get() + b * num_sums);
  });
  finish_stats<T>(a.loss, moments, sums.get(), blocks);
}

}  // namespace

void surrogate_loss(const SurrogateLossArgs& args) {
  if (args.loss.dtype == DType::f64)
    loss_of<double>(args);
  else
    loss_of<float>(args);
}

}  // namespace pyppo::cpu::PYPPO_ISA
