// The activations of a network's hidden layers, and of its outputs where those are log standard deviations, and their
// derivatives.
#pragma once

#include "scalar.h"

namespace pyppo::math {

template <class T>
struct TanhLimit;
template <>
struct TanhLimit<float> {
  static constexpr float value = 9.1f;  // from here on tanh rounds to 1
};
template <>
struct TanhLimit<double> {
  static constexpr double value = 19.1;
};

// e^c - 1 for c in [-60, 0], without the cancellation near 0. NaN stays NaN.
template <class T>
PYPPO_FN T expm1_negative(T c) {
  using L = Limits<T>;
  using Bits = typename L::Bits;
  const T shifted = c * T(1.4426950408889634) + L::round_magic;
  const T n = shifted - L::round_magic;
  const T r = (c - n * L::ln2_high) - n * L::ln2_low;
  const T p = r * r * exp_tail(r) + r;
  const Bits k = bit_cast<Bits>(shifted) - bit_cast<Bits>(T(L::round_magic)) + Bits(L::exponent_bias);
  const T scale = bit_cast<T>(Bits(k << L::mantissa_bits));
  return p * scale + (scale - T(1));
}

template <class T>
PYPPO_FN T tanh(T x) {
  const T magnitude = math::abs(x);
  const T e = expm1_negative(T(-2) * (magnitude > TanhLimit<T>::value ? TanhLimit<T>::value : magnitude));
  return (x < T(0) ? e : -e) / (e + T(2));
}

template <class T>
PYPPO_FN T relu(T x) {
  return x < T(0) ? T(0) : x;  // NaN stays NaN
}

template <class T>
PYPPO_FN T elu(T x) {
  const T c = x < T(-60) ? T(-60) : x;  // e^-60 is nothing against 1
  const T negative = expm1_negative(c < T(0) ? c : T(0));
  return x < T(0) ? negative : x;
}

template <class T>
PYPPO_FN T silu(T x) {
  return x * math::sigmoid(x);
}

// A log standard deviation between -limit and limit, nearly x itself where x is small.
template <class T>
PYPPO_FN T bounded_log_std(T x, T limit) {
  return limit * math::tanh(x / limit);
}

// Derivatives, from the output y where that is enough, else from the input.
template <class T>
PYPPO_FN T tanh_derivative(T y) {
  return T(1) - y * y;
}

template <class T>
PYPPO_FN T relu_derivative(T y) {
  return y > T(0) ? T(1) : T(0);
}

template <class T>
PYPPO_FN T elu_derivative(T y) {
  return y > T(0) ? T(1) : y + T(1);
}

template <class T>
PYPPO_FN T silu_derivative(T x) {
  const T s = math::sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}

template <class T>
PYPPO_FN T bounded_log_std_derivative(T y, T limit) {
  return tanh_derivative(y / limit);
}

}  // namespace pyppo::math
