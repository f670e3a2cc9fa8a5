// What the kernels share: scalars of three widths, ranks by counting.
//
// The build defines SCALAR, the element of `metric` and `x`: float, Half or BFloat16. Nothing is included, so that
// NVRTC needs no headers, and the tests compile the same text for the CPU. Blocks have BLOCK threads; blockIdx.y is
// the row of the batch. No kernel uses atomics: the same input gives the same bits.

constexpr int BLOCK = 256;
constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffff;
constexpr float TINY = 1.17549435e-38f;  // the smallest normal float32
constexpr float MISMATCH = 4.0f;         // more than the range of a cosine, see shared.py
#define INF __int_as_float(0x7f800000)

typedef long long Index;

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

#ifndef TOKOPT_HOST
__device__ inline float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ inline unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Half x) { return half_to_float(x.bits); }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

__device__ inline void store(float *place, float x) { *place = x; }
__device__ inline void store(Half *place, float x) { place->bits = float_to_half(x); }
__device__ inline void store(BFloat16 *place, float x) {
  unsigned bits = __float_as_uint(x);  // to nearest, ties to even
  place->bits = x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

typedef SCALAR Scalar;

// --- within a warp ------------------------------------------------------------------------------------------------

__device__ inline float warp_sum(float x) {
  for (int lanes = WARP / 2; lanes; lanes /= 2) x += __shfl_xor_sync(ALL, x, lanes);
  return x;
}

// The highest score seen and where it was; the lowest index among equals.
struct Best {
  float score = -INF;
  int index = 0x7fffffff;

  __device__ void see(float other, int place) {
    if (other > score || (other == score && place < index)) score = other, index = place;
  }

  __device__ void join(int lanes) {
    float other = __shfl_xor_sync(ALL, score, lanes);
    int place = __shfl_xor_sync(ALL, index, lanes);
    see(other, place);
  }
};

struct Sum {
  float total = 0;

  __device__ void see(float other, int) { total += other; }
  __device__ void join(int lanes) { total += __shfl_xor_sync(ALL, total, lanes); }
};

// --- within a block -----------------------------------------------------------------------------------------------

// How many of value(0), ..., value(count - 1) satisfy wanted(value, place). Every thread of the block has to call it,
// each with its own `wanted`.
template <class Value, class Wanted>
__device__ int count_where(int count, Value value, Wanted wanted) {
  __shared__ decltype(value(0)) part[BLOCK];
  int found = 0;
  for (int start = 0; start < count; start += BLOCK) {
    int here = min(BLOCK, count - start);
    __syncthreads();
    if (threadIdx.x < here) part[threadIdx.x] = value(start + threadIdx.x);
    __syncthreads();
    for (int i = 0; i < here; i++) found += wanted(part[i], start + i);
  }
  return found;
}

// The place of value(i) among `count` from highest to lowest, ties by lowest index. Every thread has to call it.
template <class Value>
__device__ int rank_of(int i, int count, Value value) {
  float mine = i < count ? value(i) : 0;
  return count_where(count, value, [=](float other, int j) { return other > mine || (other == mine && j < i); });
}

// The best of all threads, known to all. Every thread has to call it.
__device__ inline Best block_best(Best mine) {
  __shared__ float score[BLOCK / WARP];
  __shared__ int index[BLOCK / WARP];
  for (int lanes = WARP / 2; lanes; lanes /= 2) mine.join(lanes);
  __syncthreads();
  if (threadIdx.x % WARP == 0) score[threadIdx.x / WARP] = mine.score, index[threadIdx.x / WARP] = mine.index;
  __syncthreads();
  for (int warp = 0; warp < BLOCK / WARP; warp++) mine.see(score[warp], index[warp]);
  return mine;
}
