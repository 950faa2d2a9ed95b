// BatchNorm's factors for a vector of channels, and sums that come out the same every time.
#pragma once
#include "common.h"

namespace {

template <class S> struct Affine {
  const S *mean, *scale, *bias;
};
template <class E> struct Channel {  // one vector of channels of an Affine
  typename E::Arithmetic::Vector mean, scale, bias;
  Channel(const Affine<typename E::type>& a, long c, long m)
      : mean(get_part<E>(a.mean + c, m)), scale(get_part<E>(a.scale + c, m)), bias(get_part<E>(a.bias + c, m)) {}
  SPK_INLINE typename E::Arithmetic::Vector current(typename E::Arithmetic::Vector y) const {
    return (y - mean) * scale + bias;
  }
};

// One row of sums a thread, added in the threads' order: the same rounding every time.
struct ThreadSums {
  long width, threads;
  Scratch memory;
  ThreadSums(long width, int threads) : width(width), threads(threads), memory(threads * width * sizeof(double)) {
    memset(memory.memory, 0, threads * width * sizeof(double));
  }
  double* mine() const { return memory.as<double>() + omp_get_thread_num() * width; }
  double total(long i) const {
    double sum = 0;
    for (long t = 0; t < threads; t++) sum += memory.as<double>()[t * width + i];
    return sum;
  }
};

}  // namespace

// element: 0 for float32, 1 for float64
#define SPK_BOTH(call32, call64) \
  if (element == 0) call32;      \
  else call64
