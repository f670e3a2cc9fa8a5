// Vectors of float32 on each instruction set: a namespace of each says how many numbers one holds (WIDTH), its type
// (Float, with the operators of C), their bits as integers (Bits), and defines what the operators do not say:
//
//   all    one number in every lane          load, store   at any address
//   plus   to + a * b, rounded once or twice  codes         WIDTH bytes with signs, as floats
//   add_lanes   the sum of a vector's lanes, or those of four vectors
//   most_lanes  the largest of a vector's lanes, none of which is NaN
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
INLINE float add_lanes(Float a) { return (a[0] + a[1]) + (a[2] + a[3]); }
INLINE void add_lanes(const Float* of, float* into) {
    for (int i = 0; i < 4; ++i) into[i] = add_lanes(of[i]);
}
INLINE float most_lanes(Float a) {
    const float first = a[0] > a[1] ? a[0] : a[1], second = a[2] > a[3] ? a[2] : a[3];
    return first > second ? first : second;
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
TARGET_AVX2 INLINE __m128 halves(Float a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
TARGET_AVX2 INLINE float add_lanes(Float a) {
    const __m128 sum = halves(a), pairs = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps(pairs, pairs, 1)));
}
TARGET_AVX2 INLINE void add_lanes(const Float* of, float* into) {
    _mm_storeu_ps(into, halves(_mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]))));
}
TARGET_AVX2 INLINE float most_lanes(Float a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 pairs = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(pairs, _mm_shuffle_ps(pairs, pairs, 1)));
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
TARGET_AVX512 INLINE __m256 halves(Float a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
TARGET_AVX512 INLINE float add_lanes(Float a) { return vector_avx2::add_lanes(halves(a)); }
TARGET_AVX512 INLINE void add_lanes(const Float* of, float* into) {
    const __m256 sums[] = {halves(of[0]), halves(of[1]), halves(of[2]), halves(of[3])};
    vector_avx2::add_lanes(sums, into);
}
TARGET_AVX512 INLINE float most_lanes(Float a) {
    return vector_avx2::most_lanes(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
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
INLINE float add_lanes(Float a) { return vaddvq_f32(a); }
INLINE void add_lanes(const Float* of, float* into) {
    vst1q_f32(into, vpaddq_f32(vpaddq_f32(of[0], of[1]), vpaddq_f32(of[2], of[3])));
}
INLINE float most_lanes(Float a) { return vmaxvq_f32(a); }
}  // namespace vector_neon
#endif

}  // namespace
}  // namespace tokopt
