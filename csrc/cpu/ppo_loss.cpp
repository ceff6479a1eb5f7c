// The fused PPO loss on the CPU: log-prob, entropy, KL, surrogate and value loss with their gradients, in one pass.
#include "pool.h"
#include "ppo_loss_block.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

// Rows a task handles: a function of the width alone, so that sums do not depend on the number of threads.
inline int64_t rows_per_block(int64_t width) {
  const int64_t rows = 65536 / (width > 0 ? width : 1) / 64 * 64;
  return rows < 64 ? 64 : (rows > 2048 ? 2048 : rows);
}

struct PpoLoss {
  template <template <class, int> class Tile, class T, int L>
  static RowErrors run(const PpoLossArgs& a) {
    const int64_t batch = a.loss.batch, width = a.dist.width;
    const int64_t step = rows_per_block(width), blocks = (batch + step - 1) / step;
    const BatchMoments moments = batch_moments<T>(a.loss);
    const bool shared_log_std = a.dist.kind == Distribution::normal && !a.dist.per_sample_log_std;
    const int64_t log_stds = shared_log_std ? width : 0, stride = num_sums + log_stds;
    Scratch<double> partial(size_t(blocks * stride + num_sums * blocks));
    Scratch<RowErrors> errors(static_cast<size_t>(blocks));
    double* sums = partial.get() + blocks * log_stds;
    for (int64_t i = 0; i < blocks * num_sums; ++i) sums[i] = 0;
    const double microseconds = double(batch) * (4.0 + double(width)) * sizeof(T) / 4 * 1e-3;
    parallel_for(blocks, microseconds, [&](int64_t b) {
      const int64_t first = b * step, end = first + step < batch ? first + step : batch;
      errors.get()[b] = loss_block<Tile, T, L>(a, moments, first, end, sums + b * num_sums,
                                               shared_log_std ? partial.get() + b * width : nullptr);
    });
    finish_stats<T>(a.loss, moments, sums, blocks);
    for (int64_t j = 0; j < log_stds; ++j) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += partial.get()[b * width + j];
      static_cast<T*>(a.d_log_std)[j] = T(sum);
    }
    for (int64_t b = 0; b < blocks; ++b)
      if (errors.get()[b].action >= 0 || errors.get()[b].distribution >= 0) return errors.get()[b];
    return {};
  }
};

}  // namespace

RowErrors ppo_loss(const PpoLossArgs& args) {
  return run_on_tiles<PpoLoss>(args.dist, args.loss.dtype, args.loss.batch, args);
}

}  // namespace pyppo::cpu::PYPPO_ISA
