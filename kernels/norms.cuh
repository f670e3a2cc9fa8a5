// Norms of tokens, for kernels that compare them by cosine.
#include "shared.cuh"

// inverse[token] = 1 / |metric[token]|; a warp per token, a grid of [tokens / warps, batch].
extern "C" __global__ void __launch_bounds__(BLOCK)
    inverse_norms(const Scalar *metric, int tokens, int channels, float *inverse) {
  int token = blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (token >= tokens) return;
  metric += (Index(blockIdx.y) * tokens + token) * channels;
  float squares = 0;
  for (int c = lane; c < channels; c += WARP) squares += to_float(metric[c]) * to_float(metric[c]);
  squares = warp_sum(squares);
  if (!lane) inverse[Index(blockIdx.y) * tokens + token] = 1 / fmaxf(sqrtf(squares), TINY);
}
