// Every kernel's launch declaration: pointers, sizes, options, stream. Nothing else.
//
// All arrays are C-contiguous and checked by the caller. A nullable pointer says so. Every operation exists twice with
// one signature, in pyppo::cpu and pyppo::cuda; without nvcc, no_cuda.cpp stands in for the second.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyppo {

enum class DType { f32, f64, f16, bf16 };

enum class Distribution { categorical, bernoulli, normal };  // categorical: one or more, by nvec

enum class Objective { clip, unclipped, kl };

// What a kernel found wrong in the data: the first row concerned, or -1. On the CPU the caller raises at once.
// On CUDA the kernel clamps its reads and leaves the row in the flags a caller gave, if any.
struct RowErrors {
  int64_t action = -1;        // an action outside its range, or one the mask forbids
  int64_t distribution = -1;  // no action possible: all masked, or NaN where a sample is drawn
  int64_t index = -1;         // of a minibatch: its row does not exist
};

// --- gae -------------------------------------------------------------------------------------------------------------

struct GaeArgs {
  DType dtype;  // f32 or f64, of every float array
  int64_t num_steps, num_envs;
  const void* rewards;        // [T, N]
  const void* values;         // [T + 1, N]
  const void* final_values;   // [T, N], nullable: then values[t + 1]
  const uint8_t* terminated;  // [T, N]
  const uint8_t* truncated;   // [T, N]
  const uint8_t* valid;       // [T, N], nullable: all valid
  void* advantages;           // [T, N]
  void* returns;              // [T, N]
  double gamma, gae_lambda;
  double* moments = nullptr;  // [2, 3], nullable: of advantages and of returns at valid rows, see GaeMoment
};

enum GaeMoment { moment_count, moment_mean, moment_squared_deviations, num_gae_moments };

// --- losses ----------------------------------------------------------------------------------------------------------

// What every PPO loss has. `dtype` is the arithmetic's: f32 or f64. `network_dtype` is that of the network's outputs
// and of their gradients (logits, mean, log_std, values, and surrogate's logp, entropy, kl): dtype itself, or on CUDA
// f16 or bf16 with f32 arithmetic. Everything else has `dtype`.
struct LossArgs {
  DType dtype, network_dtype;
  int64_t batch;
  const void* old_logp;         // [B]
  const void* advantages;       // [B]
  const void* values;           // [B], nullable: no value loss; network_dtype
  const void* old_values;       // [B], nullable unless value_clip is finite
  const void* returns;          // [B], null with values
  const uint8_t* row_mask;      // [B], nullable: weights of 0 or 1. At most one of row_mask and weights.
  const void* weights;          // [B], nullable
  const void* denominator_ptr;  // scalar on the device, nullable
  double denominator;           // NaN: the sum of weights
  Objective objective;
  double clip_low, clip_high;
  double dual_clip;   // +inf: off
  double value_clip;  // +inf: off
  double kl_coef, ent_coef, vf_coef;
  bool normalize_advantages;
  void* d_values;  // [B], null with values; network_dtype
  void* stats;     // [8], see LossStat; dtype
};

enum LossStat {
  stat_loss,
  stat_policy,
  stat_value,
  stat_entropy,
  stat_approx_kl,
  stat_clip_fraction,
  stat_kl,
  stat_denominator,
  num_loss_stats
};

// Normal: logits, nvec, mask unused. Others: mean and log_std unused.
struct DistributionArgs {
  Distribution kind;
  int64_t width;        // categorical: sum of nvec; bernoulli, normal: dimensions
  const int64_t* nvec;  // host pointer, [num_parts]; categorical only
  int64_t num_parts;    // categorical: K; else width
  const void* logits;   // [B, width]
  const void* mean;     // [B, width]
  const void* log_std;  // [width], or [B, width] when per_sample_log_std
  bool per_sample_log_std;
  const uint8_t* action_mask;  // [B, width], nullable; 1 = allowed
};

struct PpoLossArgs {
  LossArgs loss;
  DistributionArgs dist;
  const void* actions;     // categorical [B, K] integers, bernoulli [B, D] integers, normal [B, D] of loss.dtype
  int action_bytes;        // size of an integer action: 1 (bernoulli), 4 or 8
  const void* old_logits;  // for the exact KL, network_dtype; null: KL is reported as 0
  const void* old_mean;
  const void* old_log_std;  // shape as log_std
  void* d_logits;           // gradients, shaped as their inputs; network_dtype
  void* d_mean;
  void* d_log_std;
};

struct SurrogateLossArgs {
  LossArgs loss;
  const void* logp;     // [B], network_dtype
  const void* entropy;  // [B], nullable
  const void* kl;       // [B], nullable
  void* d_logp;         // [B]
  void* d_entropy;      // [B], null with entropy
  void* d_kl;           // [B], null with kl
};

// --- sample ----------------------------------------------------------------------------------------------------------

struct SampleArgs {
  DType dtype, network_dtype;  // as in LossArgs
  int64_t batch;
  DistributionArgs dist;
  uint64_t seed;
  int64_t row_offset;
  const int64_t* steps;  // [B], nullable: then `step` for every row
  int64_t step;
  bool deterministic;
  void* actions;  // int64 [B, K] or [B, D]; normal: [B, D] of dtype
  void* logp;     // [B], dtype
  void* entropy;  // [B], dtype
};

// --- adam ------------------------------------------------------------------------------------------------------------

struct AdamArgs {
  DType dtype;  // f32 or f64
  int64_t size;
  void* params;
  const void* grads;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t* step;                  // one element, incremented by an applied step
  const void* learning_rate_ptr;  // scalar on the device, nullable
  double learning_rate;
  double beta1, beta2, eps, weight_decay;
  double max_grad_norm;  // +inf: no clipping
  const uint8_t* skip;   // one element, nullable; non-zero: nothing changes
  void* grad_norm;       // one element of dtype: the norm before clipping
};

// --- permutation -----------------------------------------------------------------------------------------------------

struct PermutationArgs {
  int64_t n;
  uint64_t seed;
  uint32_t iteration, epoch;
  int64_t* out;  // [n]
};

// --- gather_minibatch ------------------------------------------------------------------------------------------------

struct GatherColumn {
  const void* from;  // [rows, row_bytes]
  void* to;          // [C, row_bytes]
  int64_t rows, row_bytes;
};

constexpr int max_gather_columns = 32;

// One part of a shuffled rollout. C = ceil(capacity / num_parts) slots, of which the part may leave a few unused.
struct GatherArgs {
  const GatherColumn* columns;  // host pointer, [num_columns]; each has a row if C is not 0
  int num_columns;
  int64_t capacity;
  const int64_t* rows;   // [capacity], of which the first `count` matter
  const int64_t* order;  // [capacity], likewise: a permutation of [0, count)
  const int64_t* count;  // one element, in [0, capacity]
  const int64_t* part;   // one element, in [0, num_parts)
  int64_t num_parts;     // in [1, 2^31)
  float* weights;        // [C]: 1 for a row, 0 where the slot is unused
};

// --- normalize -------------------------------------------------------------------------------------------------------

enum class NumberType { i8, u8, i16, i32, i64, f32, f64 };

struct NormalizeArgs {
  NumberType type;  // of x
  int64_t rows, features;
  const void* x;       // [rows, features]
  const double* mean;  // [features]
  const double* var;   // [features]
  double eps;
  float clip;  // +inf: off
  float* out;  // [rows, features]
};

// --- multilayer perceptrons: policies that run wholly on the CPU -----------------------------------------------------

enum class Activation { tanh, relu, elu, silu };

// One layer: weight [outputs, inputs] and bias [outputs] at these offsets of the parameters, and of their gradients.
struct DenseLayer {
  int64_t inputs, outputs, weight, bias;
};

// An actor and a critic, after a shared trunk or each from the features. All layers of the trunk are activated, and all
// but the last of the others.
struct Mlp {
  DType dtype;  // f32 or f64: of the parameters and of the arithmetic
  Activation activation;
  const DenseLayer* layers;  // the trunk's, the actor's, the critic's
  int64_t num_trunk, num_actor, num_critic;
  const void* params;
  const float* obs_mean;  // [F], nullable: features are clip((obs - mean) * scale), else the observations themselves
  const float* obs_scale;
  float obs_clip;  // +inf: off
};

// The distribution of the actor's outputs: logits [A] or, normal, means [A]. Where a normal's log_std is no parameter,
// A outputs x more follow the means, and log_std is limit * tanh(x / limit).
struct MlpDistribution {
  Distribution kind;
  int64_t width;        // A
  const int64_t* nvec;  // host pointer, [num_parts]; categorical only
  int64_t num_parts;    // categorical: K; else A
  int64_t log_std;      // normal: offset of log_std [A] in the parameters; -1: the actor's second half
  double log_std_limit;
};

struct MlpValueArgs {
  Mlp mlp;
  int64_t rows;
  const float* obs;  // [rows, F]
  float* values;     // [rows]
};

struct MlpActArgs {
  Mlp mlp;
  MlpDistribution dist;
  int64_t rows;
  const float* obs;            // [rows, F]
  const uint8_t* action_mask;  // [rows, A], nullable; 1 = allowed
  uint64_t seed;
  int64_t row_offset;
  const int64_t* steps;  // [rows]
  void* actions;         // [rows, K]: int64, or float for a normal
  float* logp;           // [rows]
  float* values;         // [rows]
  float* old_params;     // [rows, A], nullable: where to keep logits or means
  float* old_log_std;    // [rows, A], nullable
  NumberType env_type;
  void* env_actions;            // [rows, K]
  const int64_t* action_start;  // [K], nullable: added to discrete actions
  const double* action_low;     // [K], normal; infinite: no bound
  const double* action_high;
  bool rescale;  // [-1, 1] is stretched to finite bounds
};

// A rollout as an update reads it, rows t * N + n.
struct MlpRollout {
  const float* obs;            // [rows, F]
  const uint8_t* action_mask;  // [rows, A], nullable; 1 = allowed
  const void* actions;         // [rows, K]: int64, or float for a normal
  const float* logp;           // [rows], as all that follow
  const float* advantages;
  const float* returns;
  const float* values;
  const float* old_params;   // [rows, A], nullable: no KL
  const float* old_log_std;  // [rows, A], nullable
};

constexpr int64_t mlp_stats = num_loss_stats + 2;  // a minibatch's: LossStat's, the gradient's norm, whether applied

struct MlpUpdateArgs {
  Mlp mlp;
  MlpDistribution dist;
  MlpRollout rollout;
  const int64_t* rows;  // [num_rows], the rollout's valid rows
  int64_t num_rows;
  uint64_t seed;
  uint32_t iteration;
  int64_t epochs, num_minibatches;
  LossArgs loss;    // its options; arrays unused
  AdamArgs adam;    // params, exp_avg, exp_avg_sq, step and options
  void* grads;      // [P]
  double kl_limit;  // +inf: off. A minibatch with a larger approximate KL is not applied, and ends the update.
  double* stats;    // [epochs * num_minibatches, mlp_stats]
  int64_t* seen;    // minibatches in stats
};

namespace cpu {

void mlp_value(const MlpValueArgs& args);
RowErrors mlp_act(const MlpActArgs& args);
RowErrors mlp_update(const MlpUpdateArgs& args);
// The mean KL(old || present) over args.rows, in args.stats[0].
RowErrors mlp_kl(const MlpUpdateArgs& args);

void gae(const GaeArgs& args);
RowErrors ppo_loss(const PpoLossArgs& args);
void surrogate_loss(const SurrogateLossArgs& args);
RowErrors sample(const SampleArgs& args);
void adam(const AdamArgs& args);
void permutation(const PermutationArgs& args);
RowErrors gather_minibatch(const GatherArgs& args);
void normalize(const NormalizeArgs& args);

// The instruction set in use: "avx512", "avx2" or "portable"; PYPPO_CPU overrides it, read when the first kernel runs.
const char* capability();
int get_num_threads();
void set_num_threads(int count);
// Whether kernels that the calling thread runs keep to it, however many threads there are.
void set_alone(bool on);

}  // namespace cpu

namespace cuda {

using Stream = void*;  // a cudaStream_t

// Bytes of device memory a launch needs besides its arguments; may be 0. Contents need no initialisation, and no launch
// leaves anything there for another.
size_t gae_workspace(const GaeArgs& args);
size_t ppo_loss_workspace(const PpoLossArgs& args);
size_t surrogate_loss_workspace(const SurrogateLossArgs& args);
size_t adam_workspace(const AdamArgs& args);

// Launch on `stream` of the current device, so that a graph can capture them: no synchronisation, no allocation, but
// for 64 KiB once a device and again for each 16,384 streams and captured launches, which are kept. Copies of one
// captured launch must not run at the same time. `errors`: three int64 on the device, nullable, initialised to -1 by
// the caller: RowErrors' action, distribution and index. A failed launch throws std::runtime_error.
void gae(const GaeArgs& args, void* workspace, Stream stream);
void ppo_loss(const PpoLossArgs& args, void* workspace, int64_t* errors, Stream stream);
void surrogate_loss(const SurrogateLossArgs& args, void* workspace, Stream stream);
void sample(const SampleArgs& args, int64_t* errors, Stream stream);
void adam(const AdamArgs& args, void* workspace, Stream stream);
void permutation(const PermutationArgs& args, Stream stream);
void gather_minibatch(const GatherArgs& args, int64_t* errors, Stream stream);
void normalize(const NormalizeArgs& args, Stream stream);

// Makes `device` current and returns the one that was.
int set_device(int device);

struct Info {
  int runtime_version;  // 0: built without CUDA
  int driver_version;   // 0: no driver
  int device_count;
};
Info info();

}  // namespace cuda

}  // namespace pyppo
