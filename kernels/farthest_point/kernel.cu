// Greedy farthest-point selection: one block per row holds the distance of every token to the chosen ones, and
// computes those to the newest choice only, so there is no matrix of distances; see reference.py.
#include "norms.cuh"
#include "pairs.cuh"

// DivPrune's first choice: start[i] is the distance of the nearest other token. A grid of [tiles of tokens, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) isolation(
    const Scalar *metric, const float *size, const float *inverse, int tokens, int channels, int prefix,
    float *start) {
  Index first = Index(blockIdx.y) * tokens;
  metric += first * channels, size += first + prefix, inverse += first;
  int free = tokens - prefix;
  Units all{free, metric, inverse, channels, prefix};
  Best seen[EACH];
  auto score = [=](int row, int column, float cosine) { return column == row || size[column] == 0 ? -INF : cosine; };
  all_pairs(all, all, channels, score, seen);
  for (int e = 0; e < EACH; e++) {
    int row = row_to_write(e, free);
    if (row >= 0) start[Index(blockIdx.y) * free + row] = size[row] > 0 ? 1 - seen[e].score : -INF;
  }
}

// The mean of the real tokens; a grid of [blocks of channels, batch].
extern "C" __global__ void __launch_bounds__(BLOCK)
    centres(const Scalar *metric, const float *size, int tokens, int channels, int prefix, float *centre) {
  int channel = blockIdx.x * BLOCK + threadIdx.x;
  if (channel >= channels) return;
  metric += Index(blockIdx.y) * tokens * channels, size += Index(blockIdx.y) * tokens;
  float sum = 0, real = 0;
  for (int token = prefix; token < tokens; token++)
    if (size[token] > 0) sum += to_float(metric[Index(token) * channels + channel]), real++;
  centre[Index(blockIdx.y) * channels + channel] = sum / fmaxf(real, 1);
}

// The k-center start: less the squared distance to the centre; a warp per token.
extern "C" __global__ void __launch_bounds__(BLOCK) centrality(
    const Scalar *metric, const float *size, const float *centre, int tokens, int channels, int prefix,
    float *start) {
  int free = tokens - prefix, i = blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (i >= free) return;
  metric += (Index(blockIdx.y) * tokens + prefix + i) * channels, centre += Index(blockIdx.y) * channels;
  float squares = 0;
  for (int c = lane; c < channels; c += WARP) {
    float apart = to_float(metric[c]) - centre[c];
    squares += apart * apart;
  }
  squares = warp_sum(squares);
  bool real = size[Index(blockIdx.y) * tokens + prefix + i] > 0;
  if (!lane) start[Index(blockIdx.y) * free + i] = real ? -squares : -INF;
}

// The distance of two tokens, for a whole warp: 1 - cosine, or without `inverse` the squared Euclidean one.
__device__ inline float distance(const Scalar *metric, const float *inverse, int channels, int a, int b) {
  const Scalar *x = metric + Index(a) * channels, *y = metric + Index(b) * channels;
  float sum = 0;
  for (int c = threadIdx.x % WARP; c < channels; c += WARP) {
    float left = to_float(x[c]), right = to_float(y[c]);
    sum += inverse ? left * inverse[a] * (right * inverse[b]) : (left - right) * (left - right);
  }
  sum = warp_sum(sum);
  return fmaxf(inverse ? 1 - sum : sum, 0);
}

// Choose and write both outputs; for a whole block.
__device__ inline void choose(
    const Scalar *metric, const float *size, const float *inverse, const float *start, int tokens, int channels,
    int r, int prefix, float *nearest, Index *keep, Index *drop) {
  int free = tokens - prefix, chosen = free - r;
  Index row = blockIdx.y;
  metric += row * tokens * channels, size += row * tokens + prefix, start += row * free, nearest += row * free;
  metric += Index(prefix) * channels;
  if (inverse) inverse += row * tokens + prefix;
  Best pick;
  for (int i = threadIdx.x; i < free; i += BLOCK) pick.see(start[i], i), nearest[i] = INF;
  pick = block_best(pick);
  for (int step = 0; step < chosen; step++) {
    for (int i = threadIdx.x / WARP; i < free; i += BLOCK / WARP) {
      float apart = size[i] > 0 ? distance(metric, inverse, channels, i, pick.index) : -1;
      if (threadIdx.x % WARP == 0) nearest[i] = i == pick.index ? -INF : fminf(nearest[i], apart);
    }
    __syncthreads();
    Best next;
    for (int i = threadIdx.x; i < free; i += BLOCK) next.see(nearest[i], i);
    pick = block_best(next);
  }
  keep += row * (tokens - r), drop += row * r;
  for (int i = threadIdx.x; i < prefix; i += BLOCK) keep[i] = i;
  for (int from = 0; from < free; from += BLOCK) {
    int i = from + threadIdx.x;
    int before = count_where(
        free, [=](int j) { return nearest[j]; }, [=](float value, int j) { return j < i && value == -INF; });
    if (i < free) (nearest[i] == -INF ? keep[prefix + before] : drop[i - before]) = prefix + i;
  }
}

// DivPrune; a grid of [1, batch]. `nearest` is scratch of `start`'s shape.
extern "C" __global__ void __launch_bounds__(BLOCK) choose_by_angle(
    const Scalar *metric, const float *size, const float *inverse, const float *start, int tokens, int channels,
    int r, int prefix, float *nearest, Index *keep, Index *drop) {
  choose(metric, size, inverse, start, tokens, channels, r, prefix, nearest, keep, drop);
}

// The k-center cover; as above.
extern "C" __global__ void __launch_bounds__(BLOCK) choose_by_distance(
    const Scalar *metric, const float *size, const float *start, int tokens, int channels, int r, int prefix,
    float *nearest, Index *keep, Index *drop) {
  choose(metric, size, nullptr, start, tokens, channels, r, prefix, nearest, keep, drop);
}
