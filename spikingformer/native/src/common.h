// Shared by every kernel file: one vector type per instruction set, element types, surrogates, thread ranges.
//
// Each .cpp here is compiled once per instruction set with SPK_ISA (name) and SPK_VECTOR_BYTES (64, 32 or 16)
// defined. The code uses the compiler's vector extensions, so 16-byte vectors become SSE2 on x86 and NEON on Arm.
// Everything is in an anonymous namespace: two instruction sets must never share an inline function.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else  // one thread where the compiler has no OpenMP
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif

#define SPK_CAT3_(a, b, c) a##b##_##c
#define SPK_CAT3(a, b, c) SPK_CAT3_(a, b, c)
// Exported C symbol: spk_<isa>_<name>; the Python loader picks the instruction set.
#define SPK_EXPORT(name) extern "C" __attribute__((visibility("default"))) void SPK_CAT3(spk_, SPK_ISA, name)
#define SPK_INLINE inline __attribute__((always_inline))

namespace {

struct Float {
  typedef float Scalar;
  typedef float Vector __attribute__((vector_size(SPK_VECTOR_BYTES)));
  typedef int32_t Integer __attribute__((vector_size(SPK_VECTOR_BYTES)));
  static constexpr long lanes = SPK_VECTOR_BYTES / 4;
};
struct Double {
  typedef double Scalar;
  typedef double Vector __attribute__((vector_size(SPK_VECTOR_BYTES)));
  typedef int64_t Integer __attribute__((vector_size(SPK_VECTOR_BYTES)));
  static constexpr long lanes = SPK_VECTOR_BYTES / 8;
};

template <class A> SPK_INLINE typename A::Vector load(const typename A::Scalar* p) {
  typename A::Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class A> SPK_INLINE void store(typename A::Scalar* p, typename A::Vector v) { memcpy(p, &v, sizeof v); }
template <class A> SPK_INLINE typename A::Vector load_part(const typename A::Scalar* p, long n) {
  typename A::Vector v = {};
  memcpy(&v, p, n * sizeof(typename A::Scalar));
  return v;
}
template <class A> SPK_INLINE void store_part(typename A::Scalar* p, typename A::Vector v, long n) {
  memcpy(p, &v, n * sizeof(typename A::Scalar));
}
template <class A> SPK_INLINE typename A::Vector splat(typename A::Scalar s) { return s - (typename A::Vector){}; }
// mask ? a : b, lane by lane; masks are 0 or -1 integers.
template <class A>
SPK_INLINE typename A::Vector select(typename A::Integer mask, typename A::Vector a, typename A::Vector b) {
#if SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (typename A::Vector)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)mask);
#endif
  return (typename A::Vector)((mask & (typename A::Integer)a) | (~mask & (typename A::Integer)b));
}
template <class A> SPK_INLINE typename A::Vector only_where(typename A::Integer mask, typename A::Vector a) {
  return (typename A::Vector)(mask & (typename A::Integer)a);
}
template <class A> SPK_INLINE typename A::Vector absolute(typename A::Vector a) {
  typedef typename A::Integer I;
  return (typename A::Vector)((I)a & ~(I)splat<A>(-(typename A::Scalar)0));
}

// Element types in memory; `Arithmetic` is what the kernel computes in.
struct ElementF32 {
  typedef float type;
  typedef Float Arithmetic;
  static SPK_INLINE Float::Vector get(const float* p) { return load<Float>(p); }
  static SPK_INLINE void put(float* p, Float::Vector v) { store<Float>(p, v); }
};
struct ElementF64 {
  typedef double type;
  typedef Double Arithmetic;
  static SPK_INLINE Double::Vector get(const double* p) { return load<Double>(p); }
  static SPK_INLINE void put(double* p, Double::Vector v) { store<Double>(p, v); }
};
typedef uint32_t LaneU32 __attribute__((vector_size(SPK_VECTOR_BYTES)));
typedef uint16_t LaneU16 __attribute__((vector_size(SPK_VECTOR_BYTES / 2)));
struct ElementBF16 {
  typedef uint16_t type;
  typedef Float Arithmetic;
  static SPK_INLINE Float::Vector get(const uint16_t* p) {
    LaneU16 h;
    memcpy(&h, p, sizeof h);
    return (Float::Vector)(__builtin_convertvector(h, LaneU32) << 16);
  }
  static SPK_INLINE void put(uint16_t* p, Float::Vector v) {
    LaneU32 u = (LaneU32)v;
    LaneU32 nan = (LaneU32)(v != v);
    LaneU32 even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    LaneU16 h = __builtin_convertvector((nan & 0x7fc0u) | (~nan & even), LaneU16);
    memcpy(p, &h, sizeof h);
  }
};
SPK_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu, u;
  float f;
  if (exponent == 31) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    f = (float)mantissa * 0x1p-24f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  memcpy(&f, &u, 4);
  return f;
}
SPK_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal half: let float addition round to the nearest even
    float m;
    memcpy(&m, &magnitude, 4);
    m += 0.5f;
    memcpy(&u, &m, 4);
    return (uint16_t)(sign | (u - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return (uint16_t)(sign | (rounded >> 13));
}
struct ElementF16 {
  typedef uint16_t type;
  typedef Float Arithmetic;
  static SPK_INLINE Float::Vector get(const uint16_t* p) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (Float::Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif SPK_VECTOR_BYTES == 32 && defined(__F16C__)
    return (Float::Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Float::Vector v;
    for (long i = 0; i < Float::lanes; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
  }
  static SPK_INLINE void put(uint16_t* p, Float::Vector v) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif SPK_VECTOR_BYTES == 32 && defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (long i = 0; i < Float::lanes; i++) p[i] = float_to_half(v[i]);
#endif
  }
};
// The first n lanes of a possibly short vector.
template <class E> SPK_INLINE typename E::Arithmetic::Vector get_part(const typename E::type* p, long n) {
  if (n == E::Arithmetic::lanes) return E::get(p);
  typename E::type copy[E::Arithmetic::lanes] = {};
  memcpy(copy, p, n * sizeof(typename E::type));
  return E::get(copy);
}
template <class E> SPK_INLINE void put_part(typename E::type* p, typename E::Arithmetic::Vector v, long n) {
  if (n == E::Arithmetic::lanes) {
    E::put(p, v);
    return;
  }
  typename E::type copy[E::Arithmetic::lanes];
  E::put(copy, v);
  memcpy(p, copy, n * sizeof(typename E::type));
}

SPK_INLINE Float::Vector multiply_add(Float::Vector a, Float::Vector b, Float::Vector c) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Float::Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SPK_VECTOR_BYTES == 32 && defined(__FMA__)
  return (Float::Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
SPK_INLINE Double::Vector multiply_add(Double::Vector a, Double::Vector b, Double::Vector c) { return a * b + c; }

// -|a|
template <class A> SPK_INLINE typename A::Vector negative_absolute(typename A::Vector a) {
  const typename A::Integer sign = (typename A::Integer)splat<A>(-0.);
  return (typename A::Vector)((typename A::Integer)a | sign);
}

// 2^y for y <= 0: n = y rounded, and a polynomial of the rest, |f| <= 1/2 (minimax, fitted by iterated least squares with
// the constant kept at 1; in pairs, so that no long chain of operations waits); relative error below 2e-7, and of
// exp(x) = 2^(x log2 e) another |y| * 4e-8 from rounding y. Below -126 it stays at 2^-126.
SPK_INLINE Float::Vector power_of_two(Float::Vector y) {
  typedef Float A;
#if SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  y = (A::Vector)_mm256_max_ps((__m256)splat<A>(-126.f), (__m256)y);
#else
  y = select<A>(y < splat<A>(-126.f), splat<A>(-126.f), y);
#endif
  const A::Vector magic = splat<A>(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const A::Vector shifted = y + magic, f = y - (shifted - magic), f2 = f * f;
  const A::Vector low = multiply_add(f, splat<A>(0.693147004f), splat<A>(1.f));
  const A::Vector middle = multiply_add(f, splat<A>(0.0555073358f), splat<A>(0.240222424f));
  const A::Vector high = multiply_add(f, splat<A>(0.00132647273f), splat<A>(0.00967151299f));
  const A::Vector p = multiply_add(f2, multiply_add(f2, high, middle), low);
  return (A::Vector)((A::Integer)p + ((A::Integer)shifted << 23));  // magic's own low bits are zeros
}
SPK_INLINE Double::Vector power_of_two(Double::Vector y) {
  typedef Double A;
  y = select<A>(y < splat<A>(-1022.), splat<A>(-1022.), y);
  const double magic = 6755399441055744.;  // 1.5 * 2^52
  const A::Vector shifted = y + magic, r = (y - (shifted - magic)) * 0.693147180559945309417;
  static const double inverse_factorial[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880,
                                             1. / 40320, 1. / 5040, 1. / 720, 1. / 120, 1. / 24, 1. / 6, 0.5, 1., 1.};
  A::Vector p = splat<A>(inverse_factorial[0]);
  for (int i = 1; i < 14; i++) p = p * r + inverse_factorial[i];
  return (A::Vector)((A::Integer)p + ((A::Integer)shifted << 52));
}
constexpr double kLog2E = 1.44269504088896340736;

// ds/dh as a function of u = h - v_threshold. The numbers are those of spikingformer/neurons/surrogate.py.
enum Surrogate { kSigmoid, kATan, kRectangle, kTriangle, kFastSigmoid, kGaussian, kSurrogates };
template <class A, int kind>
SPK_INLINE typename A::Vector surrogate_slope(typename A::Vector u, typename A::Scalar alpha) {
  typedef typename A::Vector V;
  typedef typename A::Scalar S;
  if (kind == kSigmoid) {
    // a s (1 - s) = a e / (1 + e)^2 with e = exp(-a |u|): even in u, no cancellation.
    V e = power_of_two(negative_absolute<A>(u) * (S)(alpha * kLog2E));
    V d = (S)1 + e;
    return e * alpha / (d * d);
  }
  if (kind == kATan) {
    V z = u * (S)(1.57079632679489661923 * alpha);
    return (alpha / 2) / ((S)1 + z * z);
  }
  if (kind == kRectangle) return only_where<A>(absolute<A>(u) < splat<A>((S)0.5 / alpha), splat<A>(alpha));
  if (kind == kTriangle) {
    V z = (S)1 - absolute<A>(u) * alpha;
    return only_where<A>(z > splat<A>(0), z * alpha);
  }
  if (kind == kFastSigmoid) {
    V z = (S)1 + absolute<A>(u) * alpha;
    return (S)1 / (z * z);
  }
  V z = u * alpha;
  return power_of_two(z * z * (S)-kLog2E) * (S)(0.56418958354775628695 * alpha);
}

// The neuron's constants, as the Python side sends them.
struct NeuronArgs {
  double tau, v_threshold, v_reset, alpha;
  int32_t hard_reset, detach_reset, decay_input, surrogate, steps, unused;
};

// `standard` fixes at compile time what the published models use (tau a power of two, hard reset, input decayed, reset
// detached from the gradient); its branches, though always predicted, cost half the speed of a neuron alone.
template <class A, bool standard = false> struct Neuron {
  typedef typename A::Vector V;
  typedef typename A::Integer I;
  typedef typename A::Scalar S;
  S tau, inverse_tau, v_threshold, v_reset, v_rest, alpha;
  bool exact_inverse, hard, detach, decay;
  int surrogate;
  explicit Neuron(const NeuronArgs& a)
      : tau((S)a.tau), inverse_tau((S)(1 / a.tau)), v_threshold((S)a.v_threshold), v_reset((S)a.v_reset),
        v_rest(a.hard_reset ? (S)a.v_reset : (S)0), alpha((S)a.alpha), hard(a.hard_reset != 0),
        detach(a.detach_reset != 0), decay(a.decay_input != 0), surrogate(a.surrogate) {
    // A power of two: multiplying by the inverse gives the very bits that dividing gives.
    uint64_t u;
    double t = a.tau;
    memcpy(&u, &t, 8);
    exact_inverse = (u & 0xfffffffffffffull) == 0;
  }
  bool is_standard() const { return exact_inverse && hard && detach && decay; }
  SPK_INLINE bool is_hard() const { return standard || hard; }
  SPK_INLINE bool is_detached() const { return standard || detach; }
  SPK_INLINE bool decays_input() const { return standard || decay; }
  SPK_INLINE V over_tau(V d) const { return standard || exact_inverse ? d * inverse_tau : d / tau; }
  // Same operations in the same order as the plain form, so that spikes agree to the bit.
  SPK_INLINE V charge(V v, V x) const {
    V leaked = v - v_rest;
    return decays_input() ? v + over_tau(x - leaked) : v - over_tau(leaked) + x;
  }
  SPK_INLINE I fires(V h) const { return h >= splat<A>(v_threshold); }
  SPK_INLINE V reset(V h, I fired) const {
    if (is_hard()) return select<A>(fired, splat<A>(v_reset), h);
    return h - only_where<A>(fired, splat<A>(v_threshold));
  }
  // Gradient of h_t from the gradients of s_t and of v_t (after the reset).
  template <int kind> SPK_INLINE V grad_charge(V h, V grad_spike, V grad_v) const {
    V slope = surrogate_slope<A, kind>(h - v_threshold, alpha);
    I fired = fires(h);
    if (is_detached()) return grad_spike * slope + (is_hard() ? only_where<A>(~fired, grad_v) : grad_v);
    if (is_hard()) return (grad_spike + grad_v * (v_reset - h)) * slope + only_where<A>(~fired, grad_v);
    return (grad_spike - grad_v * v_threshold) * slope + grad_v;
  }
};

struct Range {
  long begin, end;
};
// This thread's share of n items, in multiples of `grain`.
SPK_INLINE Range my_share(long n, long grain) {
  long threads = omp_get_num_threads(), me = omp_get_thread_num();
  long blocks = (n + grain - 1) / grain;
  long b = blocks * me / threads * grain, e = blocks * (me + 1) / threads * grain;
  return {b < n ? b : n, e < n ? e : n};
}
SPK_INLINE long minimum(long a, long b) { return a < b ? a : b; }
SPK_INLINE long maximum(long a, long b) { return a > b ? a : b; }

#define SPK_INLINE_LAMBDA __attribute__((always_inline))
// f(i, lanes) over n elements in whole vectors, then once with what is left.
template <long L, class F> SPK_INLINE void for_each_vector(long n, F&& f) {
  long i = 0;
  for (; i + L <= n; i += L) f(i, L);
  if (i < n) f(i, n - i);
}

// Aligned scratch memory of one call.
struct Scratch {
  void* memory;
  explicit Scratch(size_t bytes) : memory(aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Scratch() { free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T> T* as() const { return (T*)memory; }
};

// Turns the surrogate's number into a compile-time constant.
template <int v> struct IntConstant { static constexpr int value = v; };
// f(neuron) with the neuron's flags fixed at compile time where they are the usual ones (in float32).
template <class A, class F> SPK_INLINE void with_neuron(const NeuronArgs& args, F&& f) {
  const Neuron<A> neuron(args);
  if constexpr (sizeof(typename A::Scalar) == 4) {
    if (neuron.is_standard()) return f(Neuron<A, true>(args));
  }
  f(neuron);
}
template <class F> SPK_INLINE void with_surrogate(int kind, F&& f) {
  switch (kind) {
    case kSigmoid: f(IntConstant<kSigmoid>{}); break;
    case kATan: f(IntConstant<kATan>{}); break;
    case kRectangle: f(IntConstant<kRectangle>{}); break;
    case kTriangle: f(IntConstant<kTriangle>{}); break;
    case kFastSigmoid: f(IntConstant<kFastSigmoid>{}); break;
    default: f(IntConstant<kGaussian>{}); break;
  }
}

}  // namespace
