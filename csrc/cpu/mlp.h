// A multilayer perceptron's forward and backward pass over one block of L samples.
#pragma once

#include "../math/activation.h"
#include "isa.h"
#include "matmul.h"
#include "memory.h"
#include "tile.h"

namespace pyppo::cpu {
namespace {  // one copy for each instruction set

constexpr int mlp_lanes = 32;          // samples of a block: two vectors of AVX-512 floats, four of AVX2's
constexpr int64_t wide_layer = 65536;  // weights: from here on they and a block's activations outgrow the caches

// Which layers there are, and which feeds which.
class Layers {
 public:
  explicit Layers(const Mlp& mlp) : mlp_(mlp) {}
  int64_t count() const { return mlp_.num_trunk + mlp_.num_actor + mlp_.num_critic; }
  int64_t actor_head() const { return mlp_.num_trunk + mlp_.num_actor - 1; }
  int64_t critic_head() const { return count() - 1; }
  int64_t actor() const { return mlp_.num_trunk; }
  int64_t critic() const { return mlp_.num_trunk + mlp_.num_actor; }
  const DenseLayer& operator[](int64_t l) const { return mlp_.layers[l]; }
  bool is_head(int64_t l) const { return l == actor_head() || l == critic_head(); }
  // The layer whose output is layer l's input; -1: the features.
  int64_t source(int64_t l) const { return l == actor() || l == critic() ? mlp_.num_trunk - 1 : l - 1; }
  int64_t features() const { return mlp_.layers[0].inputs; }

  int64_t widest() const {
    int64_t most = features();
    for (int64_t l = 0; l < count(); ++l) most = mlp_.layers[l].outputs > most ? mlp_.layers[l].outputs : most;
    return most;
  }
  // Outputs of all layers before layer l.
  int64_t outputs_before(int64_t l) const {
    int64_t sum = 0;
    for (int64_t k = 0; k < l; ++k) sum += mlp_.layers[k].outputs;
    return sum;
  }
  // Whether a layer's weights are worth a copy in the order in which its products read them.
  bool is_wide(int64_t l) const { return mlp_.layers[l].inputs * mlp_.layers[l].outputs >= wide_layer; }
  int64_t multiplications() const {
    int64_t sum = 0;
    for (int64_t l = 0; l < count(); ++l) sum += mlp_.layers[l].inputs * mlp_.layers[l].outputs;
    return sum;
  }

 private:
  const Mlp& mlp_;
};

// Calls f(i) for each element of a tile in the first `vectors` vectors of its lanes.
template <int L, class T, class F>
inline void for_tile(int64_t width, int vectors, const F& f) {
  const int lanes = vectors * vector_lanes<T>;
  if (lanes == L) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width * L; ++i) f(i);
    return;
  }
  for (int64_t j = 0; j < width; ++j) {
    const int64_t at = j * L;
#pragma GCC ivdep
    for (int i = 0; i < lanes; ++i) f(at + i);
  }
}

// y becomes its activation; `inputs`, if not null, keeps what y was.
template <int L, class T>
inline void activate(Activation kind, T* __restrict y, T* __restrict inputs, int64_t width, int vectors) {
  if (inputs != nullptr) for_tile<L, T>(width, vectors, [=](int64_t i) { inputs[i] = y[i]; });
  switch (kind) {
    case Activation::tanh:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = math::tanh(y[i]); });
    case Activation::relu:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = math::relu(y[i]); });
    case Activation::elu:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = math::elu(y[i]); });
    case Activation::silu:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = math::silu(y[i]); });
  }
}

// y, an activation's output, becomes the gradient at its input: d times the derivative.
template <int L, class T>
inline void differentiate(Activation kind, T* __restrict y, const T* __restrict inputs, const T* __restrict d,
                          int64_t width, int vectors) {
  switch (kind) {
    case Activation::tanh:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = d[i] * math::tanh_derivative(y[i]); });
    case Activation::relu:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = d[i] * math::relu_derivative(y[i]); });
    case Activation::elu:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = d[i] * math::elu_derivative(y[i]); });
    case Activation::silu:
      return for_tile<L, T>(width, vectors, [=](int64_t i) { y[i] = d[i] * math::silu_derivative(inputs[i]); });
  }
}

// Outputs of the actor become log standard deviations.
template <int L, class T>
inline void bound_log_stds(T* __restrict x, int64_t width, int vectors, T limit) {
  for_tile<L, T>(width, vectors, [=](int64_t i) { x[i] = math::bounded_log_std(x[i], limit); });
}

// And back: `log_std` becomes the gradient of what it was, `d` being its own.
template <int L, class T>
inline void differentiate_log_stds(T* __restrict log_std, const T* __restrict d, int64_t width, int vectors, T limit) {
  for_tile<L, T>(width, vectors,
                 [=](int64_t i) { log_std[i] = d[i] * math::bounded_log_std_derivative(log_std[i], limit); });
}

// Features of one row, as pyppo.normalize computes them: in float32, whatever the arithmetic's type.
template <class T>
inline void read_features(const Mlp& mlp, const float* __restrict obs, T* __restrict features, int64_t width) {
  if (mlp.obs_mean == nullptr) {
    for (int64_t k = 0; k < width; ++k) features[k] = T(obs[k]);
    return;
  }
  const float* __restrict mean = mlp.obs_mean, * __restrict scale = mlp.obs_scale;
  const float limit = mlp.obs_clip;
  for (int64_t k = 0; k < width; ++k) {
    const float x = (obs[k] - mean[k]) * scale[k];
    features[k] = T(x < -limit ? -limit : (x > limit ? limit : x));  // NaN stays NaN, and is found
  }
}

// Copies of the wide layers' weights, packed for the forward and for the backward product.
template <class T>
class PackedWeights {
 public:
  // `wanted`: whether there will be rows enough to be worth the copies.
  PackedWeights(const Mlp& mlp, bool wanted)
      : layers_(mlp), wanted_(wanted), weights_(size_t(offset(2 * layers_.count()))) {}

  // The packed tiles of layer l, or of its transpose; null: there are none.
  const T* forward(int64_t l) const { return has(2 * l) ? weights_.get() + offset(2 * l) : nullptr; }
  const T* backward(int64_t l) const { return has(2 * l + 1) ? weights_.get() + offset(2 * l + 1) : nullptr; }

  // The copies in parts that can be made at once: how many, and one of them.
  int64_t parts() const {
    int64_t sum = 0;
    for (int64_t copy = 0; copy < 2 * layers_.count(); ++copy) sum += parts_of(copy);
    return sum;
  }
  void pack(const T* params, int64_t part) const {
    int64_t copy = 0;
    for (; part >= parts_of(copy); ++copy) part -= parts_of(copy);
    const DenseLayer& layer = layers_[copy / 2];
    const bool turned = copy % 2 == 1;
    const int64_t begin = part * part_tiles, end = begin + part_tiles;
    pack_tiles(params + layer.weight, turned ? 1 : layer.inputs, turned ? layer.inputs : 1, rows_of(copy),
               columns_of(copy), begin, end < tiles_of(copy) ? end : tiles_of(copy), weights_.get() + offset(copy));
  }

 private:
  static constexpr int64_t part_tiles = 8;  // whole cache lines of a transposed matrix

  // Copy 2 l is layer l's weights, copy 2 l + 1 their transpose, which the features' gradient would want: nobody does.
  bool has(int64_t copy) const {
    return wanted_ && layers_.is_wide(copy / 2) && (copy % 2 == 0 || layers_.source(copy / 2) >= 0);
  }
  int64_t rows_of(int64_t copy) const { return copy % 2 == 0 ? layers_[copy / 2].outputs : layers_[copy / 2].inputs; }
  int64_t columns_of(int64_t copy) const {
    return copy % 2 == 0 ? layers_[copy / 2].inputs : layers_[copy / 2].outputs;
  }
  int64_t tiles_of(int64_t copy) const { return has(copy) ? packed_tiles(rows_of(copy)) : 0; }
  int64_t parts_of(int64_t copy) const { return (tiles_of(copy) + part_tiles - 1) / part_tiles; }
  int64_t offset(int64_t copy) const {
    int64_t sum = 0;
    for (int64_t c = 0; c < copy; ++c) sum += tiles_of(c) * packed_rows * columns_of(c);
    return sum;
  }

  const Layers layers_;
  const bool wanted_;
  const Scratch<T> weights_;
};

// The tiles of one block: features [F][L], each layer's output [outputs][L], its input where the derivative wants it.
template <class T>
struct BlockTiles {
  T* features;
  T* outputs;  // all layers', one after another
  T* inputs;   // the same layout; null unless the activation is silu and a backward pass follows
  int vectors;
};

template <class T, int L>
class MlpBlock {
 public:
  // `packed`: may be null.
  MlpBlock(const Mlp& mlp, const BlockTiles<T>& tiles, const PackedWeights<T>* packed)
      : mlp_(mlp), layers_(mlp), params_(static_cast<const T*>(mlp.params)), tiles_(tiles), packed_(packed) {}

  T* output(int64_t l) const { return tiles_.outputs + layers_.outputs_before(l) * L; }

  // Runs the layers [begin, end).
  void forward(int64_t begin, int64_t end) const {
    for (int64_t l = begin; l < end; ++l) {
      const DenseLayer& layer = layers_[l];
      const T* x = layers_.source(l) < 0 ? tiles_.features : output(layers_.source(l));
      const T* bias = params_ + layer.bias;
      if (const T* packed = packed_ == nullptr ? nullptr : packed_->forward(l))
        dense_packed<L>(packed, bias, layer.inputs, layer.outputs, x, output(l), tiles_.vectors, false);
      else
        dense_forward<L>(params_ + layer.weight, bias, layer.inputs, layer.outputs, x, output(l), tiles_.vectors);
      if (!layers_.is_head(l)) activate<L>(mlp_.activation, output(l), kept_input(l), layer.outputs, tiles_.vectors);
    }
  }

  // From the gradients of both heads' outputs, which stand in their output tiles, to those of every layer's input
  // before activation, in place of its output. `scratch`: two tiles of the widest layer.
  void backward(T* scratch) const {
    T* d = scratch;
    T* d_trunk = scratch + layers_.widest() * L;
    descend(layers_.critic_head(), layers_.critic(), d);
    descend(layers_.actor_head(), layers_.actor(), d);
    if (mlp_.num_trunk == 0) return;
    const int64_t last = mlp_.num_trunk - 1;
    input_gradient(layers_.critic(), d_trunk, false);
    input_gradient(layers_.actor(), d_trunk, true);
    through_activation(last, d_trunk);
    descend(last, 0, d);
  }

 private:
  T* kept_input(int64_t l) const {
    return tiles_.inputs == nullptr ? nullptr : tiles_.inputs + layers_.outputs_before(l) * L;
  }

  void descend(int64_t from, int64_t to, T* d) const {
    for (int64_t l = from; l > to; --l) {
      input_gradient(l, d, false);
      through_activation(l - 1, d);
    }
  }

  void input_gradient(int64_t l, T* d, bool accumulate) const {
    const DenseLayer& layer = layers_[l];
    if (const T* packed = packed_ == nullptr ? nullptr : packed_->backward(l))
      dense_packed<L, T>(packed, nullptr, layer.outputs, layer.inputs, output(l), d, tiles_.vectors, accumulate);
    else
      dense_backward<L>(params_ + layer.weight, layer.inputs, layer.outputs, output(l), d, tiles_.vectors, accumulate);
  }

  void through_activation(int64_t l, const T* d) const {
    differentiate<L>(mlp_.activation, output(l), kept_input(l), d, layers_[l].outputs, tiles_.vectors);
  }

  const Mlp& mlp_;
  const Layers layers_;
  const T* params_;
  const BlockTiles<T>& tiles_;
  const PackedWeights<T>* packed_;
};

inline int vectors_of(int64_t count, int lanes) { return int((count + lanes - 1) / lanes); }

// What a block of act needs of memory, and the forward pass from observations.
template <class T, int L>
class ForwardBlock {
 public:
  explicit ForwardBlock(const Mlp& mlp)
      : mlp_(mlp),
        layers_(mlp),
        memory_(size_t((2 * layers_.features() + layers_.outputs_before(layers_.count())) * L)),
        tiles_{memory_.get(), memory_.get() + layers_.features() * L, nullptr, 0},
        block_(mlp, tiles_, nullptr) {}

  // `count` <= L rows of observations [count, F].
  void load(const float* obs, int64_t count) {
    const int64_t width = layers_.features();
    T* rows = memory_.get() + (width + layers_.outputs_before(layers_.count())) * L;
    for (int64_t i = 0; i < count; ++i) read_features(mlp_, obs + i * width, rows + i * width, width);
    load_tile<L>(tiles_.features, rows, int(count), width);
    tiles_.vectors = vectors_of(count, vector_lanes<T>);
    block_.forward(0, mlp_.num_trunk);
  }

  // The actor's outputs [outputs][L], and the critic's [L].
  T* actor() {
    block_.forward(layers_.actor(), layers_.critic());
    return block_.output(layers_.actor_head());
  }
  const T* critic() {
    block_.forward(layers_.critic(), layers_.count());
    return block_.output(layers_.critic_head());
  }
  int vectors() const { return tiles_.vectors; }

 private:
  const Mlp& mlp_;
  const Layers layers_;
  const Scratch<T> memory_;
  BlockTiles<T> tiles_;
  const MlpBlock<T, L> block_;
};

}  // namespace
}  // namespace pyppo::cpu
