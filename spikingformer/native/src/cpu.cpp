// What this processor can run. Compiled once, for the oldest processor of its kind.
#include <cstring>

extern "C" __attribute__((visibility("default"))) int spk_cpu_supports(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (!strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
  return !strcmp(isa, "portable") || !strcmp(isa, "neon");
}

#if defined(__GLIBC__)
#include <malloc.h>
#endif
// Freed blocks stay with the process: mapping fresh pages for every activation costs more than computing on it.
extern "C" __attribute__((visibility("default"))) void spk_keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, 2000000000);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}
