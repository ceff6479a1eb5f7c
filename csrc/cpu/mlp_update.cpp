// The update of a multilayer perceptron: for each minibatch gather, forward, loss, backward, gradient clipping and
// Adam.
//
// Rows are divided by blocks, weight gradients by weight rows, and what is summed over either is summed in a fixed
// order: the same bits for any number of threads.
#include "mlp.h"
#include "pool.h"
#include "ppo_loss_block.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int L = mlp_lanes;
constexpr double microseconds_per_product = 4e-5;

// Some rows of one layer's weight gradient.
struct WeightTask {
  int64_t layer, begin, end;
};
// Whole tiles of every instruction set. More rows read the inputs less often, fewer are easier to divide.
constexpr int64_t narrow_task_rows = 12, wide_task_rows = 48;
inline int64_t task_rows(const DenseLayer& layer) { return layer.outputs < 256 ? narrow_task_rows : wide_task_rows; }
constexpr int64_t least_packed_rows = 128;  // rows of a minibatch from which on packing wide layers pays

inline bool any(const RowErrors& errors) { return errors.action >= 0 || errors.distribution >= 0; }

// Minibatches of up to `capacity` rows: the memory for one, and the steps through it.
template <template <class, int> class Tile, class T>
class Minibatches {
 public:
  Minibatches(const MlpUpdateArgs& a, int64_t capacity)
      : a_(a),
        layers_(a.mlp),
        num_features_(layers_.features()),
        num_params_(a.dist.width),
        shared_log_std_(a.dist.kind == Distribution::normal && a.dist.log_std >= 0),
        own_log_std_(a.dist.kind == Distribution::normal && a.dist.log_std < 0),
        num_outputs_(layers_.outputs_before(layers_.count())),
        blocks_((capacity + L - 1) / L),
        features_(size_t(capacity * num_features_ + vector_lanes<T>)),
        hidden_(size_t(capacity * num_outputs_ + vector_lanes<T>)),
        outputs_(size_t(blocks_ * num_outputs_ * L)),
        inputs_(a.mlp.activation == Activation::silu ? size_t(blocks_ * num_outputs_ * L) : 0),
        columns_(size_t(capacity * 6)),
        params_(size_t(capacity * num_params_ * 3)),
        log_stds_(own_log_std_ ? size_t(capacity * num_params_ * 3) : size_t(num_params_)),
        masks_(a.rollout.action_mask != nullptr ? size_t(capacity * num_params_) : 0),
        actions_(size_t(capacity * a.dist.num_parts)),
        sums_(size_t(blocks_ * num_sums)),
        log_std_sums_(size_t(blocks_ * num_params_)),
        errors_(size_t(blocks_)),
        tasks_(size_t(num_outputs_ / narrow_task_rows + layers_.count())),
        packed_(a.mlp, capacity >= least_packed_rows),
        capacity_(capacity) {
    for (int64_t l = 0; l < layers_.count(); ++l) {
      const int64_t rows = task_rows(layers_[l]);
      for (int64_t j = 0; j < layers_[l].outputs; j += rows)
        tasks_.get()[num_tasks_++] = {l, j, min_of(j + rows, layers_[l].outputs)};
    }
    describe_loss();
  }

  // Loss, statistics and, if asked for, the gradients of all layers' inputs. index: the minibatch's rows.
  RowErrors pass(const int64_t* index, int64_t batch, bool with_gradients) {
    index_ = index;
    loss_.loss.batch = batch;
    // The moments are wanted before the first row's loss.
    const int64_t blocks = (batch + L - 1) / L;
    gather(advantages(), a_.rollout.advantages, 0, batch);
    const BatchMoments moments = batch_moments<T>(loss_.loss);
    for (int64_t i = 0; i < blocks * num_sums; ++i) sums_.get()[i] = 0;
    if (const int64_t parts = packed_.parts())  // takes about as long as a block's products
      parallel_for(parts, microseconds(L), [&](int64_t i) { packed_.pack(static_cast<const T*>(a_.mlp.params), i); });
    const double passes = with_gradients ? 2.0 : 1.0;
    parallel_for(blocks, passes * microseconds(batch),
                 [&](int64_t b) { errors_.get()[b] = block(b, min_of((b + 1) * L, batch), moments, with_gradients); });
    finish_stats<T>(loss_.loss, moments, sums_.get(), blocks);
    for (int64_t b = 0; b < blocks; ++b)
      if (any(errors_.get()[b])) return rows_of(errors_.get()[b]);
    return {};
  }

  // The parameters' gradients, after a pass with gradients.
  void weight_gradients() {
    const int64_t batch = loss_.loss.batch;
    T* grads = static_cast<T*>(a_.grads);
    parallel_for(num_tasks_, microseconds(batch), [&](int64_t i) {
      const WeightTask task = tasks_.get()[i];
      const DenseLayer& layer = layers_[task.layer];
      const int64_t source = layers_.source(task.layer);
      const T* x = source < 0 ? features_.get() : hidden_rows(source);
      const T* dy = outputs_.get() + layers_.outputs_before(task.layer) * L;
      weight_gradient<L>(x, capacity_, dy, num_outputs_ * L, batch, layer.inputs, task.begin, task.end,
                         grads + layer.weight, grads + layer.bias);
    });
    if (!shared_log_std_) return;
    for (int64_t j = 0; j < num_params_; ++j) {
      double sum = 0;
      for (int64_t b = 0; b * L < batch; ++b) sum += log_std_sums_.get()[b * num_params_ + j];
      grads[a_.dist.log_std + j] = T(sum);
    }
  }

  double stat(int which) const { return double(stats_[which]); }

 private:
  static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
  double microseconds(int64_t batch) const {
    return double(batch) * double(layers_.multiplications()) * microseconds_per_product;
  }

  T* column(int k) const { return columns_.get() + k * capacity_; }
  T* old_logp() const { return column(0); }
  T* advantages() const { return column(1); }
  T* returns() const { return column(2); }
  T* old_values() const { return column(3); }
  T* values() const { return column(4); }
  T* d_values() const { return column(5); }
  T* params() const { return params_.get(); }
  T* d_params() const { return params_.get() + capacity_ * num_params_; }
  T* old_params() const { return params_.get() + 2 * capacity_ * num_params_; }
  T* log_stds() const { return log_stds_.get(); }
  T* d_log_stds() const { return log_stds_.get() + capacity_ * num_params_; }
  T* old_log_stds() const { return log_stds_.get() + (own_log_std_ ? 2 * capacity_ * num_params_ : 0); }
  T* hidden_rows(int64_t l) const { return hidden_.get() + capacity_ * layers_.outputs_before(l); }

  void describe_loss() {
    const bool normal = a_.dist.kind == Distribution::normal;
    loss_.loss = a_.loss;
    loss_.loss.dtype = loss_.loss.network_dtype = a_.mlp.dtype;
    loss_.loss.old_logp = old_logp();
    loss_.loss.advantages = advantages();
    loss_.loss.returns = returns();
    loss_.loss.values = values();
    loss_.loss.old_values = old_values();
    loss_.loss.d_values = d_values();
    loss_.loss.stats = stats_;
    loss_.dist.kind = a_.dist.kind;
    loss_.dist.width = num_params_;
    loss_.dist.nvec = a_.dist.nvec;
    loss_.dist.num_parts = a_.dist.num_parts;
    loss_.dist.logits = loss_.dist.mean = params();
    loss_.dist.log_std = own_log_std_ ? log_stds() : static_cast<const T*>(a_.mlp.params) + a_.dist.log_std;
    loss_.dist.per_sample_log_std = own_log_std_;
    loss_.dist.action_mask = a_.rollout.action_mask != nullptr ? masks_.get() : nullptr;
    loss_.d_logits = loss_.d_mean = d_params();
    loss_.d_log_std = own_log_std_ ? d_log_stds() : nullptr;
    loss_.actions = actions_.get();
    loss_.action_bytes = 8;
    if (a_.rollout.old_params == nullptr) return;
    (normal ? loss_.old_mean : loss_.old_logits) = old_params();
    if (normal) loss_.old_log_std = old_log_stds();
    if (!shared_log_std_ || a_.num_rows == 0) return;
    // One for all rows: the policy was fixed while they were collected.
    const float* kept = a_.rollout.old_log_std + a_.rows[0] * num_params_;
    for (int64_t j = 0; j < num_params_; ++j) old_log_stds()[j] = T(kept[j]);
  }

  void gather(T* to, const float* from, int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) to[i] = T(from[index_[i]]);
  }

  // Rows of A elements; `from` may be null.
  template <class To, class From>
  void gather_wide(To* to, const From* from, int64_t first, int64_t end) const {
    if (from == nullptr) return;
    const int64_t width = num_params_, *index = index_;  // copies: bytes written could be anything's
    for (int64_t i = first; i < end; ++i)
      for (int64_t j = 0; j < width; ++j) to[i * width + j] = To(from[index[i] * width + j]);
  }

  // The rows [first, end) of the minibatch, from the rollout; their features [end - first, F].
  void gather_rows(int64_t first, int64_t end, T* features) const {
    const MlpRollout& r = a_.rollout;
    gather(old_logp(), r.logp, first, end);
    gather(returns(), r.returns, first, end);
    gather(old_values(), r.values, first, end);
    const int64_t parts = a_.dist.num_parts;
    for (int64_t i = first; i < end; ++i) {
      read_features(a_.mlp, r.obs + index_[i] * num_features_, features + (i - first) * num_features_, num_features_);
      if (a_.dist.kind == Distribution::normal)
        for (int64_t j = 0; j < parts; ++j)
          reinterpret_cast<T*>(actions_.get())[i * parts + j] =
              T(static_cast<const float*>(r.actions)[index_[i] * parts + j]);
      else
        for (int64_t j = 0; j < parts; ++j)
          actions_.get()[i * parts + j] = static_cast<const int64_t*>(r.actions)[index_[i] * parts + j];
    }
    gather_wide(masks_.get(), r.action_mask, first, end);
    gather_wide(old_params(), r.old_params, first, end);
    if (own_log_std_) gather_wide(old_log_stds(), r.old_log_std, first, end);
  }

  // A minibatch's rows as those of the rollout.
  RowErrors rows_of(RowErrors errors) const {
    if (errors.action >= 0) errors.action = index_[errors.action];
    if (errors.distribution >= 0) errors.distribution = index_[errors.distribution];
    return errors;
  }

  // A tile [width][L] to the rows from `first` on of panels [capacity, width].
  void store_panels(T* panels, int64_t first, int count, const T* tile, int64_t width) const {
    for (int64_t k = 0; k < width; k += panel_columns<T>) {
      const Panel<T> panel = panel_at(panels, capacity_, width, k);
      store_tile<L>(panel.first + first * panel.width, tile + k * L, count, panel.width);
    }
  }

  RowErrors block(int64_t b, int64_t end, const BatchMoments& moments, bool with_gradients) {
    const int64_t first = b * L;
    const int count = int(end - first);
    const Scratch<T> feature_tile(size_t(num_features_ * L)), feature_rows(size_t(num_features_ * L));
    gather_rows(first, end, feature_rows.get());
    load_tile<L>(feature_tile.get(), feature_rows.get(), count, num_features_);
    const BlockTiles<T> tiles{feature_tile.get(), outputs_.get() + b * num_outputs_ * L,
                              a_.mlp.activation == Activation::silu ? inputs_.get() + b * num_outputs_ * L : nullptr,
                              vectors_of(count, vector_lanes<T>)};
    const MlpBlock<T, L> network(a_.mlp, tiles, &packed_);
    const int64_t actor = layers_.actor_head(), critic = layers_.critic_head();
    network.forward(0, layers_.count());
    T *outputs = network.output(actor), *own_log_stds = outputs + num_params_ * L;
    const int64_t at = first * num_params_;
    store_tile<L>(params() + at, outputs, count, num_params_);
    if (own_log_std_) {
      bound_log_stds<L>(own_log_stds, num_params_, tiles.vectors, T(a_.dist.log_std_limit));
      store_tile<L>(log_stds() + at, own_log_stds, count, num_params_);
    }
    store_tile<L>(values() + first, network.output(critic), count, 1);
    const RowErrors errors = loss_block<Tile, T, L>(loss_, moments, first, end, sums_.get() + b * num_sums,
                                                    shared_log_std_ ? log_std_sums_.get() + b * num_params_ : nullptr);
    if (!with_gradients) return errors;
    store_panels(features_.get(), first, count, feature_tile.get(), num_features_);
    for (int64_t l = 0; l < layers_.count(); ++l)
      if (!layers_.is_head(l)) store_panels(hidden_rows(l), first, count, network.output(l), layers_[l].outputs);
    load_tile<L>(outputs, d_params() + at, count, num_params_);
    load_tile<L>(network.output(critic), d_values() + first, count, 1);
    const Scratch<T> scratch(size_t(2 * layers_.widest() * L));
    if (own_log_std_) {
      load_tile<L>(scratch.get(), d_log_stds() + at, count, num_params_);
      differentiate_log_stds<L>(own_log_stds, scratch.get(), num_params_, tiles.vectors, T(a_.dist.log_std_limit));
    }
    network.backward(scratch.get());
    return errors;
  }

  const MlpUpdateArgs& a_;
  const Layers layers_;
  const int64_t num_features_, num_params_;
  const bool shared_log_std_, own_log_std_;  // a normal's: a parameter, or the actor's outputs after the means
  const int64_t num_outputs_, blocks_;
  const Scratch<T> features_;  // panels of [capacity, F]
  const Scratch<T> hidden_;    // panels of [capacity, outputs] for each layer that feeds another
  const Scratch<T> outputs_;   // [blocks][all layers' outputs][L]; after backward the gradients of their inputs
  const Scratch<T> inputs_;    // the same, of what was activated; silu only
  const Scratch<T> columns_;
  const Scratch<T> params_;    // [capacity, A] of logits or means, their gradients, the old ones
  const Scratch<T> log_stds_;  // the same, of log_stds; where all rows share one, only the old one [A]
  const Scratch<uint8_t> masks_;
  const Scratch<int64_t> actions_;  // or T, for a normal
  const Scratch<double> sums_, log_std_sums_;
  const Scratch<RowErrors> errors_;
  const Scratch<WeightTask> tasks_;
  const PackedWeights<T> packed_;
  const int64_t capacity_;
  int64_t num_tasks_ = 0;
  const int64_t* index_ = nullptr;
  PpoLossArgs loss_{};
  T stats_[num_loss_stats];
};

// One minibatch's step. Returns whether the update goes on.
template <class M>
bool step(const MlpUpdateArgs& a, M& minibatch, double norm(const AdamArgs&)) {
  double* stats = a.stats + *a.seen * mlp_stats;
  for (int k = 0; k < num_loss_stats; ++k) stats[k] = minibatch.stat(k);
  minibatch.weight_gradients();
  const bool skip = stats[stat_approx_kl] > a.kl_limit;
  const uint8_t skipped = skip;
  AdamArgs adam = a.adam;
  adam.skip = &skipped;
  stats[num_loss_stats] = norm(adam);
  stats[num_loss_stats + 1] = skip ? 0.0 : 1.0;
  ++*a.seen;
  return !skip;
}

template <class T>
double apply_adam(const AdamArgs& args) {
  T norm;
  AdamArgs a = args;
  a.grad_norm = &norm;
  adam(a);
  return double(norm);
}

template <template <class, int> class Tile, class T>
RowErrors update_of(const MlpUpdateArgs& a) {
  *a.seen = 0;
  if (a.num_rows == 0) return {};
  const BusySection busy;
  const int64_t parts = a.num_minibatches;
  Minibatches<Tile, T> minibatch(a, (a.num_rows + parts - 1) / parts);
  const Scratch<int64_t> order(static_cast<size_t>(a.num_rows));
  for (int64_t epoch = 0; epoch < a.epochs; ++epoch) {
    permutation({a.num_rows, a.seed, a.iteration, uint32_t(epoch), order.get()});
    for (int64_t i = 0; i < a.num_rows; ++i) order.get()[i] = a.rows[order.get()[i]];
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t start = a.num_rows * part / parts, stop = a.num_rows * (part + 1) / parts;
      if (start == stop) continue;
      const RowErrors errors = minibatch.pass(order.get() + start, stop - start, true);
      if (any(errors)) return errors;
      if (!step(a, minibatch, apply_adam<T>)) return {};
    }
  }
  return {};
}

template <template <class, int> class Tile, class T>
RowErrors kl_of(const MlpUpdateArgs& a) {
  constexpr int64_t chunk = 8192;
  const BusySection busy;
  Minibatches<Tile, T> rows(a, a.num_rows < chunk ? a.num_rows : chunk);
  double sum = 0;
  for (int64_t first = 0; first < a.num_rows; first += chunk) {
    const int64_t count = a.num_rows - first < chunk ? a.num_rows - first : chunk;
    const RowErrors errors = rows.pass(a.rows + first, count, false);
    if (any(errors)) return errors;
    sum += rows.stat(stat_kl) * double(count);
  }
  a.stats[0] = sum / double(a.num_rows);
  return {};
}

template <class T>
RowErrors choose_update(const MlpUpdateArgs& a) {
  switch (a.dist.kind) {
    case Distribution::bernoulli:
      return update_of<BernoulliTile, T>(a);
    case Distribution::normal:
      return update_of<NormalTile, T>(a);
    default:
      return update_of<CategoricalTile, T>(a);
  }
}

template <class T>
RowErrors choose_kl(const MlpUpdateArgs& a) {
  switch (a.dist.kind) {
    case Distribution::bernoulli:
      return kl_of<BernoulliTile, T>(a);
    case Distribution::normal:
      return kl_of<NormalTile, T>(a);
    default:
      return kl_of<CategoricalTile, T>(a);
  }
}

}  // namespace

RowErrors mlp_update(const MlpUpdateArgs& args) {
  return args.mlp.dtype == DType::f64 ? choose_update<double>(args) : choose_update<float>(args);
}

RowErrors mlp_kl(const MlpUpdateArgs& args) {
  return args.mlp.dtype == DType::f64 ? choose_kl<double>(args) : choose_kl<float>(args);
}

}  // namespace pyppo::cpu::PYPPO_ISA
