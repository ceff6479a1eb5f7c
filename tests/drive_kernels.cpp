// Runs the CPU kernels from several threads at once, for ThreadSanitizer: .ci/sanitize builds and starts it. Beside
// what that reports, every result must have the same bits at 1, 2, 3 and 7 threads, alone and beside other callers.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/kernels.h"

namespace {

using namespace pyppo;

constexpr double infinity = std::numeric_limits<double>::infinity();

std::vector<float> numbers(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = normal(random);
  return out;
}

// All that a run wrote, one after another.
using Bytes = std::string;

template <class T>
void append(Bytes& bytes, const std::vector<T>& values) {
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

Bytes run_gae() {
  const int64_t T = 64, N = 4096;
  const std::vector<float> rewards = numbers(T * N, 1), values = numbers((T + 1) * N, 2);
  std::vector<uint8_t> terminated(T * N), truncated(T * N);
  for (int64_t i = 0; i < T * N; i += 37) terminated[i] = 1;
  std::vector<float> advantages(T * N), returns(T * N);
  std::vector<double> moments(2 * num_gae_moments);
  cpu::gae({DType::f32, T, N, rewards.data(), values.data(), nullptr, terminated.data(), truncated.data(), nullptr,
            advantages.data(), returns.data(), 0.99, 0.95, moments.data()});
  Bytes out;
  append(out, advantages);
  append(out, returns);
  append(out, moments);
  return out;
}

LossArgs loss_options() {
  LossArgs a{};
  a.dtype = a.network_dtype = DType::f32;
  a.denominator = NAN;
  a.objective = Objective::clip;
  a.clip_low = a.clip_high = 0.2;
  a.dual_clip = a.value_clip = infinity;
  a.ent_coef = 0.01;
  a.vf_coef = 0.5;
  a.normalize_advantages = true;
  return a;
}

Bytes run_loss() {
  const int64_t B = 16384, A = 5, nvec[] = {A};
  const std::vector<float> logits = numbers(B * A, 3), advantages = numbers(B, 4), values = numbers(B, 5),
                           returns = numbers(B, 6), old_logp(B, -1.5f);
  std::vector<int64_t> actions(B);
  for (int64_t i = 0; i < B; ++i) actions[i] = i * 7 % A;
  std::vector<float> d_logits(B * A), d_values(B), stats(num_loss_stats);
  PpoLossArgs a{};
  a.loss = loss_options();
  a.loss.batch = B;
  a.loss.old_logp = old_logp.data();
  a.loss.advantages = advantages.data();
  a.loss.values = values.data();
  a.loss.returns = returns.data();
  a.loss.d_values = d_values.data();
  a.loss.stats = stats.data();
  a.dist.kind = Distribution::categorical;
  a.dist.width = A;
  a.dist.nvec = nvec;
  a.dist.num_parts = 1;
  a.dist.logits = logits.data();
  a.actions = actions.data();
  a.action_bytes = 8;
  a.d_logits = d_logits.data();
  cpu::ppo_loss(a);
  Bytes out;
  append(out, d_logits);
  append(out, d_values);
  append(out, stats);
  return out;
}

Bytes run_surrogate_loss() {
  const int64_t B = 150000;  // more rows than one block of sums, of which a few have no weight
  const std::vector<float> logp = numbers(B, 15), entropy = numbers(B, 16), advantages = numbers(B, 17),
                           values = numbers(B, 18), returns = numbers(B, 19), old_values = numbers(B, 20);
  std::vector<float> old_logp = logp;
  for (int64_t i = 0; i < B; ++i) old_logp[i] += 0.1f * float(i % 7 - 3);
  std::vector<uint8_t> counts(B, 1);
  for (int64_t i = 0; i < B; i += 11) counts[i] = 0;
  std::vector<float> d_logp(B), d_entropy(B), d_values(B), stats(num_loss_stats);
  SurrogateLossArgs a{};
  a.loss = loss_options();
  a.loss.batch = B;
  a.loss.old_logp = old_logp.data();
  a.loss.advantages = advantages.data();
  a.loss.values = values.data();
  a.loss.old_values = old_values.data();
  a.loss.returns = returns.data();
  a.loss.row_mask = counts.data();
  a.loss.value_clip = 0.2;
  a.loss.d_values = d_values.data();
  a.loss.stats = stats.data();
  a.logp = logp.data();
  a.entropy = entropy.data();
  a.d_logp = d_logp.data();
  a.d_entropy = d_entropy.data();
  cpu::surrogate_loss(a);
  Bytes out;
  append(out, d_logp);
  append(out, d_entropy);
  append(out, d_values);
  append(out, stats);
  return out;
}

Bytes run_sample() {
  const int64_t B = 16384, D = 4;
  const std::vector<float> mean = numbers(B * D, 13), log_std = numbers(D, 14);
  std::vector<float> actions(B * D), logp(B), entropy(B);
  SampleArgs a{};
  a.dtype = a.network_dtype = DType::f32;
  a.batch = B;
  a.dist.kind = Distribution::normal;
  a.dist.width = D;
  a.dist.mean = mean.data();
  a.dist.log_std = log_std.data();
  a.seed = 4;
  a.actions = actions.data();
  a.logp = logp.data();
  a.entropy = entropy.data();
  cpu::sample(a);
  Bytes out;
  append(out, actions);
  append(out, logp);
  append(out, entropy);
  return out;
}

Bytes run_adam_and_permutation() {
  const int64_t P = 300000;
  std::vector<float> params = numbers(P, 7), exp_avg(P), exp_avg_sq(P);
  const std::vector<float> grads = numbers(P, 8);
  int64_t step = 0;
  float norm;
  AdamArgs a{};
  a.dtype = DType::f32;
  a.size = P;
  a.params = params.data();
  a.grads = grads.data();
  a.exp_avg = exp_avg.data();
  a.exp_avg_sq = exp_avg_sq.data();
  a.step = &step;
  a.learning_rate = 1e-3;
  a.beta1 = 0.9;
  a.beta2 = 0.999;
  a.eps = 1e-5;
  a.max_grad_norm = 0.5;
  a.grad_norm = &norm;
  for (int i = 0; i < 3; ++i) cpu::adam(a);
  std::vector<int64_t> order(20000);
  cpu::permutation({int64_t(order.size()), 1, 2, 3, order.data()});
  Bytes out;
  append(out, params);
  append(out, order);
  return out;
}

Bytes run_gather_and_normalize() {
  const int64_t R = 30000, F = 37, parts = 3, slots = R / parts;
  const std::vector<float> obs = numbers(R * F, 21);
  std::vector<int64_t> rows(R), order(R), actions(R), chosen(slots);
  for (int64_t i = 0; i < R; ++i) {
    rows[i] = R - 1 - i;
    actions[i] = i % 7;
  }
  cpu::permutation({R, 4, 5, 6, order.data()});
  std::vector<float> gathered(slots * F), weights(slots), normalized(slots * F);
  const int64_t count = R, part = 1;
  const GatherColumn columns[] = {{obs.data(), gathered.data(), R, int64_t(F * sizeof(float))},
                                  {actions.data(), chosen.data(), R, int64_t(sizeof(int64_t))}};
  const RowErrors errors =
      cpu::gather_minibatch({columns, 2, R, rows.data(), order.data(), &count, &part, parts, weights.data()});
  if (errors.index >= 0) std::abort();
  const std::vector<double> mean(F, 0.25), var(F, 2.0);
  cpu::normalize({NumberType::f32, slots, F, gathered.data(), mean.data(), var.data(), 1e-8, 1.5f, normalized.data()});
  Bytes out;
  append(out, gathered);
  append(out, chosen);
  append(out, weights);
  append(out, normalized);
  return out;
}

// A small policy: acts for a rollout, then updates on it. Either a normal, or one of A actions of which a mask forbids
// some.
Bytes run_mlp(bool masked) {
  const int64_t T = 32, N = 24, rows = T * N, F = 11, H = 40, A = 3, K = masked ? 1 : A;
  std::vector<DenseLayer> layers;
  int64_t size = 0;
  const auto offset = [&](int64_t count) {
    const int64_t at = size;
    size += (count + 15) / 16 * 16;
    return at;
  };
  for (int64_t outputs : {A, int64_t(1)}) {
    int64_t inputs = F;
    for (int64_t width : {H, outputs}) {
      const int64_t weight = offset(inputs * width), bias = offset(width);
      layers.push_back({inputs, width, weight, bias});
      inputs = width;
    }
  }
  const int64_t log_std = offset(A);
  std::vector<float> params = numbers(size_t(size), 9), grads(params.size()), exp_avg(params.size()),
                     exp_avg_sq(params.size());
  for (float& p : params) p *= 0.3f;
  const std::vector<float> obs = numbers((rows + N) * F, 10), advantages = numbers(rows, 11),
                           returns = numbers(rows, 12), mean(F), scale(F, 1.0f);
  std::vector<float> drawn(rows * A), logp(rows), values(rows + N);
  std::vector<int64_t> chosen(rows);
  std::vector<uint8_t> mask((rows + N) * A, 1);
  for (size_t i = 0; i < mask.size(); i += 4) mask[i] = 0;
  std::vector<double> env_actions(N * K);
  const std::vector<double> low(A, -1.0), high(A, 1.0);
  std::vector<int64_t> steps(N), index(rows);
  for (int64_t i = 0; i < rows; ++i) index[i] = i;
  const Mlp mlp{DType::f32, Activation::tanh, layers.data(), 0, 2, 2, params.data(), mean.data(), scale.data(), 10.0f};
  const int64_t nvec[] = {A};
  const MlpDistribution dist = masked ? MlpDistribution{Distribution::categorical, A, nvec, 1, 0, 0.0}
                                      : MlpDistribution{Distribution::normal, A, nullptr, A, log_std, 0.0};
  const uint8_t* allowed = masked ? mask.data() : nullptr;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t at = t * N;
    MlpActArgs a{};
    a.mlp = mlp;
    a.dist = dist;
    a.rows = N;
    a.obs = obs.data() + at * F;
    a.action_mask = masked ? allowed + at * A : nullptr;
    a.seed = 5;
    a.steps = steps.data();
    a.actions = masked ? static_cast<void*>(chosen.data() + at) : drawn.data() + at * A;
    a.logp = logp.data() + at;
    a.values = values.data() + at;
    a.env_type = NumberType::f64;
    a.env_actions = env_actions.data();
    a.action_low = low.data();
    a.action_high = high.data();
    cpu::mlp_act(a);
    for (int64_t& step : steps) ++step;
  }
  MlpUpdateArgs u{};
  int64_t step = 0, seen = 0;
  u.mlp = mlp;
  u.dist = dist;
  u.rollout.obs = obs.data();
  u.rollout.action_mask = allowed;
  u.rollout.actions = masked ? static_cast<const void*>(chosen.data()) : drawn.data();
  u.rollout.logp = logp.data();
  u.rollout.advantages = advantages.data();
  u.rollout.returns = returns.data();
  u.rollout.values = values.data();
  u.rows = index.data();
  u.num_rows = rows;
  u.seed = 6;
  u.epochs = 3;
  u.num_minibatches = 7;
  u.loss = loss_options();
  u.loss.value_clip = 0.2;
  u.grads = grads.data();
  u.adam.dtype = DType::f32;
  u.adam.size = size;
  u.adam.params = params.data();
  u.adam.grads = grads.data();
  u.adam.exp_avg = exp_avg.data();
  u.adam.exp_avg_sq = exp_avg_sq.data();
  u.adam.step = &step;
  u.adam.learning_rate = 3e-4;
  u.adam.beta1 = 0.9;
  u.adam.beta2 = 0.999;
  u.adam.eps = 1e-5;
  u.adam.max_grad_norm = 0.5;
  u.kl_limit = infinity;
  std::vector<double> stats(size_t(u.epochs * u.num_minibatches * mlp_stats));
  u.stats = stats.data();
  u.seen = &seen;
  const RowErrors errors = cpu::mlp_update(u);
  if (errors.action >= 0 || errors.distribution >= 0 || seen == 0) std::abort();
  Bytes out;
  append(out, params);
  append(out, stats);
  append(out, drawn);
  append(out, chosen);
  append(out, env_actions);
  return out;
}

struct Kernel {
  const char* name;
  std::function<Bytes()> run;
  Bytes wanted;
};

int check(const Kernel& kernel, const char* where) {
  if (kernel.run() == kernel.wanted) return 0;
  std::fprintf(stderr, "%s: other bits %s\n", kernel.name, where);
  return 1;
}

}  // namespace

int main() {
  std::vector<Kernel> kernels = {{"gae", run_gae, {}},
                                 {"loss", run_loss, {}},
                                 {"surrogate loss", run_surrogate_loss, {}},
                                 {"sample", run_sample, {}},
                                 {"adam", run_adam_and_permutation, {}},
                                 {"gather", run_gather_and_normalize, {}},
                                 {"mlp", [] { return run_mlp(false); }, {}},
                                 {"masked mlp", [] { return run_mlp(true); }, {}}};
  cpu::set_num_threads(1);
  for (Kernel& kernel : kernels) kernel.wanted = kernel.run();
  std::atomic<int> wrong{0};
  for (int threads : {2, 3, 7}) {
    cpu::set_num_threads(threads);
    for (int repeat = 0; repeat < 3; ++repeat)
      for (const Kernel& kernel : kernels)
        wrong += check(kernel, ("with " + std::to_string(threads) + " threads").c_str());
  }
  // Callers beside each other, who take the pool from one another, while its size changes.
  std::vector<std::thread> callers;
  for (size_t first = 0; first < kernels.size(); ++first)
    callers.emplace_back([&, first] {
      for (size_t i = 0; i < 2 * kernels.size(); ++i)
        wrong += check(kernels[(first + i) % kernels.size()], "beside others");
    });
  for (int i = 0; i < 20; ++i) {
    cpu::set_num_threads(1 + i % 4);
    std::this_thread::yield();
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("%s: %d wrong\n", cpu::capability(), wrong.load());
  return wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
