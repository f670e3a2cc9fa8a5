// Products of all pairs of rows in tiles, of which only a summary of every row leaves the chip.
#include "shared.cuh"

constexpr int TILE = 64;              // rows of a block, and columns at a time
constexpr int DEPTH = 16;             // channels at a time
constexpr int EACH = 4;               // rows, and columns at a time, of a thread
constexpr int ACROSS = TILE / EACH;   // threads that share a row
constexpr int STRIDE = TILE + 4;      // of shared memory: banks are spread, float4 stays aligned

// Rows to multiply: a `count`, and of every row the vector `at` and the factor `scale`.
//
// Tokens of one row of the batch, scaled to length 1. Those of `list`, or else every `step`th from `first` on.
struct Units {
  int count;
  const Scalar *x;
  const float *inverse;
  int channels, first = 0, step = 1;
  const Index *list = nullptr;

  __device__ int token(int place) const { return list ? int(list[place]) : first + step * place; }
  __device__ const Scalar *at(int place) const { return x + Index(token(place)) * channels; }
  __device__ float scale(int place) const { return inverse[token(place)]; }
};

// Rows as they are, times a factor.
struct Scaled {
  int count;
  const Scalar *x;
  int channels;
  float factor;

  __device__ const Scalar *at(int place) const { return x + Index(place) * channels; }
  __device__ float scale(int) const { return factor; }
};

// TILE rows, DEPTH channels from `from` on; zeros outside.
template <class Rows>
__device__ void load_tile(float (&tile)[DEPTH][STRIDE], Rows rows, int channels, int first, int from) {
  constexpr int PARTS = BLOCK / TILE;
  int row = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
  bool real = first + row < rows.count;
  const Scalar *x = real ? rows.at(first + row) : nullptr;
  float scale = real ? rows.scale(first + row) : 0;
  for (int i = 0; i < DEPTH / PARTS; i++) {
    int depth = part * (DEPTH / PARTS) + i, channel = from + depth;
    tile[depth][row] = real && channel < channels ? scale * to_float(x[channel]) : 0;
  }
}

// The rows of TILE * blockIdx.x on, EACH per thread: `seen[e]` sees score(row, column, product) of all columns, and the
// threads of a row hold the same in the end. Every thread of the block has to call it.
template <class Rows, class Columns, class Score, class Seen>
__device__ void all_pairs(Rows rows, Columns columns, int channels, Score score, Seen (&seen)[EACH]) {
  __shared__ __align__(16) float left[DEPTH][STRIDE], right[DEPTH][STRIDE];
  int top = threadIdx.x / ACROSS * EACH, side = threadIdx.x % ACROSS * EACH, first = blockIdx.x * TILE;
  for (int start = 0; start < columns.count; start += TILE) {
    float product[EACH][EACH] = {};
    for (int from = 0; from < channels; from += DEPTH) {
      __syncthreads();
      load_tile(left, rows, channels, first, from);
      load_tile(right, columns, channels, start, from);
      __syncthreads();
#pragma unroll
      for (int depth = 0; depth < DEPTH; depth++) {
        float a[EACH], b[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) a[e] = left[depth][top + e], b[e] = right[depth][side + e];
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
          for (int f = 0; f < EACH; f++) product[e][f] += a[e] * b[f];
      }
    }
    for (int e = 0; e < EACH; e++)
      for (int f = 0; f < EACH; f++) {
        int row = first + top + e, column = start + side + f;
        if (row < rows.count && column < columns.count) seen[e].see(score(row, column, product[e][f]), column);
      }
  }
  for (int e = 0; e < EACH; e++)
    for (int lanes = ACROSS / 2; lanes; lanes /= 2) seen[e].join(lanes);
}

// The row that seen[e] of all_pairs belongs to, or -1 where there is none or another thread writes it.
__device__ inline int row_to_write(int e, int count) {
  int row = blockIdx.x * TILE + threadIdx.x / ACROSS * EACH + e;
  return threadIdx.x % ACROSS || row >= count ? -1 : row;
}
