// Vectors of float32 on each instruction set: a namespace of each says how many numbers one holds (WIDTH), its type
// (Float, with the operators of C), their bits as integers (Bits), and defines what the operators do not say:
//
//   all    one number in every lane          load, store   at any address
//   plus   to + a * b, rounded once or twice  codes         WIDTH bytes with signs, as floats
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define ARM 1
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))

namespace tokopt {
namespace {

// A number at any address.
INLINE float at(const void* from) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
}

namespace vector_plain {
constexpr int WIDTH = 4;
using Float = float __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));

INLINE Float all(float value) { return Float{value, value, value, value}; }
INLINE Float load(const float* from) {
    Float value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
INLINE void store(float* to, Float value) { std::memcpy(to, &value, sizeof value); }
INLINE Float plus(Float to, Float a, Float b) { return to + a * b; }
INLINE Float codes(const int8_t* from) {
    return Float{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
}
}  // namespace vector_plain

#if X86
namespace vector_avx2 {
constexpr int WIDTH = 8;
using Float = __m256;
using Bits = uint32_t __attribute__((vector_size(32)));

TARGET_AVX2 INLINE Float all(float value) { return _mm256_set1_ps(value); }
TARGET_AVX2 INLINE Float load(const float* from) { return _mm256_loadu_ps(from); }
TARGET_AVX2 INLINE void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
TARGET_AVX2 INLINE Float plus(Float to, Float a, Float b) { return _mm256_fmadd_ps(a, b, to); }
TARGET_AVX2 INLINE Float codes(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
}  // namespace vector_avx2

namespace vector_avx512 {
constexpr int WIDTH = 16;
using Float = __m512;
using Bits = uint32_t __attribute__((vector_size(64)));

TARGET_AVX512 INLINE Float all(float value) { return _mm512_set1_ps(value); }
TARGET_AVX512 INLINE Float load(const float* from) { return _mm512_loadu_ps(from); }
TARGET_AVX512 INLINE void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
TARGET_AVX512 INLINE Float plus(Float to, Float a, Float b) { return _mm512_fmadd_ps(a, b, to); }
TARGET_AVX512 INLINE Float codes(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
}  // namespace vector_avx512
#elif ARM
namespace vector_neon {
constexpr int WIDTH = 4;
using Float = float32x4_t;
using Bits = uint32_t __attribute__((vector_size(16)));

INLINE Float all(float value) { return vdupq_n_f32(value); }
INLINE Float load(const float* from) { return vld1q_f32(from); }
INLINE void store(float* to, Float value) { vst1q_f32(to, value); }
INLINE Float plus(Float to, Float a, Float b) { return vfmaq_f32(to, a, b); }
INLINE Float codes(const int8_t* from) {
    int32_t dword;
    std::memcpy(&dword, from, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(dword))))));
}
}  // namespace vector_neon
#endif

}  // namespace
}  // namespace tokopt
