// Acting with a multilayer perceptron: from observations to actions, log-probs and values, a block of rows at a time.
#include "mlp.h"
#include "pool.h"
#include "sample_block.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

// Lanes of the block where all rows fit into it: most of a wider one would be computed, and fetched, for nothing.
constexpr int few_lanes = vector_lanes<float> < 8 ? 8 : vector_lanes<float>;

// Calls body(first, count) for each block of L rows.
template <int L, class F>
void for_blocks(const Mlp& mlp, int64_t rows, const F& body) {
  const double microseconds = double(rows) * double(Layers(mlp).multiplications()) * 4e-5;
  parallel_for((rows + L - 1) / L, microseconds, [&](int64_t b) {
    const int64_t first = b * L;
    body(first, rows - first < L ? rows - first : L);
  });
}

template <class T, int L>
void value_of(const MlpValueArgs& a) {
  const int64_t width = Layers(a.mlp).features();
  for_blocks<L>(a.mlp, a.rows, [&](int64_t first, int64_t count) {
    ForwardBlock<T, L> block(a.mlp);
    block.load(a.obs + first * width, count);
    const T* values = block.critic();
    for (int64_t i = 0; i < count; ++i) a.values[first + i] = float(values[i]);
  });
}

// What the environment is sent: pyppo.actions.Distribution.to_env, in double.
double env_action(const MlpActArgs& a, const void* actions, int64_t i, int64_t j) {
  if (a.dist.kind != Distribution::normal)
    return double(static_cast<const int64_t*>(actions)[i] + (a.action_start != nullptr ? a.action_start[j] : 0));
  const double infinity = __builtin_inf(), low = a.action_low[j], high = a.action_high[j];
  double x = double(static_cast<const float*>(actions)[i]);
  if (a.rescale && low > -infinity && high < infinity) {
    x = x < -1.0 ? -1.0 : (x > 1.0 ? 1.0 : x);
    x = low + (x + 1.0) * 0.5 * (high - low);
  }
  return x;
}

template <class E>
void write_env_actions(const MlpActArgs& a, const void* actions, E* out, int64_t count, int64_t width) {
  const bool normal = a.dist.kind == Distribution::normal;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; ++j) {
      E x = E(env_action(a, actions, i * width + j, j));
      if (normal) {  // bounds in the environment's own type, as it compares them
        const E low = E(a.action_low[j]), high = E(a.action_high[j]);
        x = x < low ? low : (x > high ? high : x);
      }
      out[i * width + j] = x;
    }
}

template <class E>
void write_env_block(const MlpActArgs& a, const void* actions, int64_t first, int64_t count, int64_t width) {
  write_env_actions(a, actions, static_cast<E*>(a.env_actions) + first * width, count, width);
}

void send_actions(const MlpActArgs& a, const void* actions, int64_t first, int64_t count, int64_t width) {
  switch (a.env_type) {
    case NumberType::i8:
      return write_env_block<int8_t>(a, actions, first, count, width);
    case NumberType::u8:
      return write_env_block<uint8_t>(a, actions, first, count, width);
    case NumberType::i16:
      return write_env_block<int16_t>(a, actions, first, count, width);
    case NumberType::i32:
      return write_env_block<int32_t>(a, actions, first, count, width);
    case NumberType::i64:
      return write_env_block<int64_t>(a, actions, first, count, width);
    case NumberType::f32:
      return write_env_block<float>(a, actions, first, count, width);
    case NumberType::f64:
      return write_env_block<double>(a, actions, first, count, width);
  }
}

template <template <class, int> class Tile, class T, int L>
RowErrors act_block(const MlpActArgs& a, int64_t first, int64_t count) {
  const Layers layers(a.mlp);
  const int64_t width = a.dist.width, parts = a.dist.num_parts;
  const bool normal = a.dist.kind == Distribution::normal, own_log_std = normal && a.dist.log_std < 0;
  ForwardBlock<T, L> block(a.mlp);
  block.load(a.obs + first * layers.features(), count);

  Scratch<T> memory(size_t((own_log_std ? 3 : 2) * width + 2) * L);
  T *params = memory.get(), *drawn = params + width * L, *logp = drawn + width * L, *entropy = logp + L,
    *log_stds = entropy + L;
  T* outputs = block.actor();
  store_tile<L>(params, outputs, int(count), width);
  if (own_log_std) {
    bound_log_stds<L>(outputs + width * L, width, block.vectors(), T(a.dist.log_std_limit));
    store_tile<L>(log_stds, outputs + width * L, int(count), width);
  }
  const T* log_std = own_log_std ? log_stds : static_cast<const T*>(a.mlp.params) + a.dist.log_std;
  SampleArgs s{};
  s.batch = count;
  s.dist.kind = a.dist.kind;
  s.dist.width = width;
  s.dist.nvec = a.dist.nvec;
  s.dist.num_parts = parts;
  s.dist.logits = s.dist.mean = params;
  s.dist.log_std = log_std;
  s.dist.action_mask = a.action_mask == nullptr ? nullptr : a.action_mask + first * width;
  s.seed = a.seed;
  s.row_offset = a.row_offset + first;
  s.steps = a.steps + first;
  s.actions = normal ? static_cast<void*>(drawn) : static_cast<int64_t*>(a.actions) + first * parts;
  s.logp = logp;
  s.entropy = entropy;
  const auto draw = [&](bool per_sample_log_std) {
    s.dist.per_sample_log_std = per_sample_log_std;
    return sample_block<Tile, T, L>(s, 0, count);
  };
  RowErrors errors = own_log_std ? draw(true) : draw(false);  // a copy of the draw for each

  void* actions = s.actions;
  if (normal) {
    float* stored = static_cast<float*>(a.actions) + first * parts;
    for (int64_t i = 0; i < count * parts; ++i) stored[i] = float(drawn[i]);
    actions = stored;
  }
  send_actions(a, actions, first, count, parts);
  for (int64_t i = 0; i < count; ++i) a.logp[first + i] = float(logp[i]);
  if (a.old_params != nullptr)
    for (int64_t i = 0; i < count * width; ++i) a.old_params[first * width + i] = float(params[i]);
  if (a.old_log_std != nullptr)
    for (int64_t i = 0; i < count * width; ++i)
      a.old_log_std[first * width + i] = float(log_std[own_log_std ? i : i % width]);
  const T* values = block.critic();
  for (int64_t i = 0; i < count; ++i) a.values[first + i] = float(values[i]);
  if (errors.distribution >= 0) errors.distribution += first;
  return errors;
}

template <template <class, int> class Tile, class T, int L>
RowErrors act_of(const MlpActArgs& a) {
  const Scratch<RowErrors> errors(size_t((a.rows + L - 1) / L));
  for_blocks<L>(a.mlp, a.rows, [&](int64_t first, int64_t count) {
    errors.get()[first / L] = act_block<Tile, T, L>(a, first, count);
  });
  for (int64_t b = 0; b * L < a.rows; ++b)
    if (errors.get()[b].distribution >= 0) return errors.get()[b];
  return {};
}

template <class T, int L>
RowErrors act_kind(const MlpActArgs& a) {
  switch (a.dist.kind) {
    case Distribution::bernoulli:
      return act_of<BernoulliTile, T, L>(a);
    case Distribution::normal:
      return act_of<NormalTile, T, L>(a);
    default:
      return act_of<CategoricalTile, T, L>(a);
  }
}

template <class T>
RowErrors act_type(const MlpActArgs& a) {
  return a.rows <= few_lanes ? act_kind<T, few_lanes>(a) : act_kind<T, mlp_lanes>(a);
}

template <class T>
void value_type(const MlpValueArgs& a) {
  return a.rows <= few_lanes ? value_of<T, few_lanes>(a) : value_of<T, mlp_lanes>(a);
}

}  // namespace

void mlp_value(const MlpValueArgs& args) {
  if (args.mlp.dtype == DType::f64)
    value_type<double>(args);
  else
    value_type<float>(args);
}

RowErrors mlp_act(const MlpActArgs& args) {
  return args.mlp.dtype == DType::f64 ? act_type<double>(args) : act_type<float>(args);
}

}  // namespace pyppo::cpu::PYPPO_ISA
